// The new K and V of a pass, from where the model computed them to where they belong, in one call: bytes of any dtype.

#include <cstdint>
#include <cstring>

// Strides in bytes, of one row or head to the next; a head's own bytes are contiguous.
struct Side {
    const char* from;  // [rows, heads, bytes]
    char* to;
    int64_t from_row, from_head, to_slot, to_token, to_head, bytes;
};

struct Call {
    int64_t rows, heads, threads;
    const int64_t *slots, *positions;  // of each row: where it goes; slots are blocks in a paged cache
    Side sides[2];
};

extern "C" void vattention_write(const Call* call) {
    const Call& c = *call;
    [[maybe_unused]] const int threads = c.rows < 64 ? 1 : int(c.threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < c.rows; row++)
        for (const Side& side : c.sides) {
            const char* from = side.from + row * side.from_row;
            char* to = side.to + c.slots[row] * side.to_slot + c.positions[row] * side.to_token;
            for (int64_t head = 0; head < c.heads; head++)
                std::memcpy(to + head * side.to_head, from + head * side.from_head, side.bytes);
        }
}

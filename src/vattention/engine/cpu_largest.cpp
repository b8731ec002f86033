// The largest number of each row of bfloat16, and where it comes first.
//
// As whole numbers of 16 bits, those of one sign are in order as they are: so a vector compares 32 of them at once. A
// part of a row is compared whole, and only the part that has the largest is looked at again.

#include <algorithm>
#include <cstdint>
#include <cstring>

struct Call {
    int64_t rows, numbers, row, threads;  // row: how far apart rows are
    const uint16_t* x;
    uint16_t* largest;  // [rows]
    int64_t* where;     // [rows]
};

namespace {

constexpr int64_t PART = 1024;
constexpr int64_t SMALL = 1 << 17;  // numbers up to which a second thread costs more than it saves

using i16 = int16_t __attribute__((vector_size(64)));
constexpr int WIDE = 32;

// In the order of the numbers; what is no number is the largest.
template <class X>
inline X order(X x) {
    const X bits = x & int16_t(0x7fff), number = x ^ (x >> 15 & int16_t(0x7fff));
    return bits > int16_t(0x7f80) ? bits | int16_t(0x7fff) : number;
}

int16_t order_of(uint16_t x) { return order<i16>(i16{} + int16_t(x))[0]; }

int16_t most(const uint16_t* x, int64_t numbers) {
    i16 vector, found = i16{} + int16_t(INT16_MIN);
    int64_t i = 0;
    for (; i + WIDE <= numbers; i += WIDE) {
        std::memcpy(&vector, x + i, sizeof vector);
        vector = order(vector);
        found = vector > found ? vector : found;
    }
    int16_t largest = INT16_MIN;
    for (int lane = 0; lane < WIDE; lane++) largest = std::max(largest, int16_t(found[lane]));
    for (; i < numbers; i++) largest = std::max(largest, order_of(x[i]));
    return largest;
}

void find(const uint16_t* x, int64_t numbers, uint16_t& largest, int64_t& where) {
    int16_t best = order_of(x[0]);
    int64_t part = 0;
    for (int64_t first = 0; first < numbers; first += PART) {
        const int16_t here = most(x + first, std::min(PART, numbers - first));
        if (here > best) best = here, part = first;
    }
    where = part;
    while (order_of(x[where]) != best) where++;
    largest = x[where];
}

}  // namespace

extern "C" void vattention_largest(const Call* call) {
    const Call& c = *call;
    [[maybe_unused]] const int threads = c.rows * c.numbers <= SMALL ? 1 : int(std::min(c.threads, c.rows));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < c.rows; i++) find(c.x + i * c.row, c.numbers, c.largest[i], c.where[i]);
}

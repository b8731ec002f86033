// Calls that were written down, made again one after the other.
//
// Functions take numbers of 64 bits and addresses, which the calling conventions of the machines we know hand over
// alike. Small work is left to one thread: to wake the others takes longer.

#include <chrono>
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

struct Step {
    void (*function)();
    int64_t count, alone;  // arguments; whether by one thread
    const int64_t* arguments;
};

namespace {

#define A(i) a[i]
#define A4(i) A(i), A(i + 1), A(i + 2), A(i + 3)
#define A8(i) A4(i), A4(i + 4)
using W = int64_t;

// In groups of 8: a function does not mind arguments behind its own, where the caller clears them away.
void run(const Step& s) {
    W a[32] = {};
    for (int64_t i = 0; i < s.count; i++) a[i] = s.arguments[i];
    if (s.count <= 8)
        reinterpret_cast<void (*)(W, W, W, W, W, W, W, W)>(s.function)(A8(0));
    else if (s.count <= 16)
        reinterpret_cast<void (*)(W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W)>(s.function)(A8(0), A8(8));
    else
        reinterpret_cast<void (*)(W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W, W,
                                  W, W)>(s.function)(A8(0), A8(8), A8(16), A8(24));
}

}  // namespace

// `seconds`: what each took is added there; null: nobody asks.
extern "C" void vattention_replay(const Step* steps, int64_t count, double* seconds) {
    using Clock = std::chrono::steady_clock;
    Clock::time_point before;
    if (seconds) before = Clock::now();
#if defined(_OPENMP)
    const int threads = omp_get_max_threads();
#endif
    for (int64_t i = 0; i < count; i++) {
#if defined(_OPENMP)
        if (steps[i].alone) omp_set_num_threads(1);
        run(steps[i]);
        if (steps[i].alone) omp_set_num_threads(threads);
#else
        run(steps[i]);
#endif
        if (!seconds) continue;
        const Clock::time_point now = Clock::now();
        seconds[i] += std::chrono::duration<double>(now - before).count();
        before = now;
    }
}

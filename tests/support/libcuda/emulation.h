/* What the parts of the emulation share. One lock covers everything; `CALL` takes it for the length of a function. */
#ifndef EMULATED_CUDA_EMULATION_H
#define EMULATED_CUDA_EMULATION_H

#include "abi.h"

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 8

/* What a call needs before it may act. */
enum { ANYTIME, INITIALIZED, IN_CONTEXT };

/* Begin a public function: lock, log, fail if a test wants it so or if the call is not allowed now. */
#define CALL(name, need)                                                                                              \
    __attribute__((cleanup(emulation_leave), unused)) int held = 1;                                                    \
    do {                                                                                                               \
        CUresult refused_ = emulation_enter(#name, need);                                                              \
        if (refused_ != CUDA_SUCCESS)                                                                                  \
            return refused_;                                                                                           \
    } while (0)

#define REFUSE_IF(condition)                                                                                           \
    do {                                                                                                               \
        if (condition)                                                                                                 \
            return CUDA_ERROR_INVALID_VALUE;                                                                           \
    } while (0)

struct Context {
    CUdevice device;
    int retained;
};

struct Settings {
    size_t granularity; /* of sizes, addresses and handles, bytes */
    size_t memory;      /* of one device, bytes */
    int devices;
    int fill;           /* new memory holds this byte, not zeros; -1 for zeros */
};

extern struct Settings settings;
extern struct Context contexts[MAX_DEVICES];

CUresult emulation_enter(const char *name, int need);
void emulation_leave(int *held);

/* The device context of the calling thread. */
CUcontext current_context(void);

/* From now on every call fails with `code`, as after a fault in a kernel. */
CUresult lose_context(CUresult code);

/* Whether the call that is going on must fail after it has acted, and with what. */
CUresult fails_after(const char *name);

/* Whether every byte of the range may be read, or written. */
int is_accessible(CUdeviceptr address, size_t size, int write);

size_t allocated_bytes(CUdevice device);

/* Do everything that was submitted, so that a fault in it shows. */
CUresult finish_all_streams(void);

/* Unmap and release everything; drop what was submitted. As when a process ends. */
void forget_memory(void);
void forget_work(void);

#endif

/* For tests alone: configuration, the call log, and failures on demand. Reached with ctypes, not part of CUDA. */
#define _GNU_SOURCE
#include "emulation.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct Settings settings = {2u << 20, (size_t)8 << 30, 1, 0xFF};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t owner; /* the process that called cuInit */
static CUresult lost;

static const char **log_names;
static size_t log_length, log_capacity;

static struct {
    char name[64]; /* empty: no failure is planned; "*": any call */
    long countdown;
    CUresult code;
    int onwards, after;
} planned;
static long failures;
static CUresult failing_after; /* of the call that is going on */

int is_initialized(void);

static void write_down(const char *name) {
    if (log_length == log_capacity) {
        log_capacity = log_capacity ? 2 * log_capacity : 1024;
        log_names = realloc(log_names, log_capacity * sizeof *log_names);
        if (!log_names)
            abort();
    }
    log_names[log_length++] = name;
}

static CUresult planned_failure(const char *name) {
    if (!planned.name[0] || (strcmp(planned.name, "*") && strcmp(planned.name, name)))
        return CUDA_SUCCESS;
    if (!strcmp(name, "cuCtxPopCurrent")) /* cannot fail where its push has not */
        return CUDA_SUCCESS;
    if (--planned.countdown > 0 || (planned.countdown < 0 && !planned.onwards))
        return CUDA_SUCCESS;
    failures++;
    return planned.code;
}

CUresult emulation_enter(const char *name, int need) {
    pthread_mutex_lock(&lock);
    if (need == ANYTIME)
        return CUDA_SUCCESS;
    write_down(name);
    failing_after = CUDA_SUCCESS;
    if (owner && getpid() != owner)
        return CUDA_ERROR_NOT_INITIALIZED; /* CUDA does not survive fork */
    if (!is_initialized() && strcmp(name, "cuInit"))
        return CUDA_ERROR_NOT_INITIALIZED;
    owner = getpid();
    if (lost)
        return lost;
    if (need == IN_CONTEXT && !current_context())
        return CUDA_ERROR_INVALID_CONTEXT;
    CUresult failure = planned_failure(name);
    if (failure && planned.after) {
        failing_after = failure;
        return CUDA_SUCCESS;
    }
    return failure;
}

void emulation_leave(int *held) {
    (void)held;
    pthread_mutex_unlock(&lock);
}

CUresult fails_after(const char *name) {
    (void)name;
    return failing_after;
}

CUresult lose_context(CUresult code) {
    lost = code;
    return code;
}

/* -- reached with ctypes ------------------------------------------------------------------------------------------ */

EXPORT int emulation_configure(size_t granularity, size_t memory, int devices, int fill) {
    if (allocated_bytes(-1) || devices < 0 || devices > MAX_DEVICES || granularity % sysconf(_SC_PAGESIZE))
        return -1;
    settings = (struct Settings){granularity, memory, devices, fill};
    return 0;
}

/* Let the `countdown`-th call of `name` from now on fail with `code`; with `after`, once it has acted (unmap only). */
EXPORT void emulation_fail(const char *name, long countdown, CUresult code, int onwards, int after) {
    pthread_mutex_lock(&lock);
    strncpy(planned.name, name, sizeof planned.name - 1);
    planned.countdown = countdown;
    planned.code = code;
    planned.onwards = onwards;
    planned.after = after;
    pthread_mutex_unlock(&lock);
}

EXPORT void emulation_repair(void) {
    pthread_mutex_lock(&lock);
    planned.name[0] = 0;
    lost = CUDA_SUCCESS; /* which no CUDA device does: it spares the tests a process each */
    pthread_mutex_unlock(&lock);
}

EXPORT void emulation_reset(void) {
    emulation_repair();
    pthread_mutex_lock(&lock);
    forget_work();
    forget_memory();
    pthread_mutex_unlock(&lock);
}

EXPORT long emulation_failures(void) { return failures; }

EXPORT size_t emulation_log_length(void) { return log_length; }

EXPORT const char *emulation_log_name(size_t index) { return index < log_length ? log_names[index] : NULL; }

EXPORT void emulation_log_clear(void) { log_length = 0; }

EXPORT size_t emulation_allocated(CUdevice device) { return allocated_bytes(device); }

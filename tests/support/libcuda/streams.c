/* Streams and events. Work is done as late as CUDA allows: when somebody waits for it. So whoever unmaps memory without
 * waiting finds the work reading it afterwards, and the context lost, every time and not just when a kernel is slow. */
#define _GNU_SOURCE
#include "emulation.h"

#include <stdlib.h>
#include <string.h>

enum { FILL, COPY };

struct Work {
    int kind, value;
    CUdeviceptr target, source;
    size_t size;
};

struct Stream {
    struct Work *queue;
    size_t submitted, done, capacity; /* counted since the stream was made */
    int capturing;
    struct Stream *next;
};

struct Event {
    CUstream stream; /* recorded on, NULL before */
    size_t position; /* work submitted before it was recorded */
};

static struct Stream null_stream;
static struct Stream *streams = &null_stream;

/* The legacy and the per-thread default stream have special handles; they are one here. */
static struct Stream *stream_of(CUstream handle) {
    if ((uintptr_t)handle <= 2)
        return &null_stream;
    for (struct Stream *stream = streams; stream; stream = stream->next)
        if (stream == handle)
            return stream;
    return NULL;
}

static CUresult run_until(struct Stream *stream, size_t position) {
    while (stream->done < position) {
        struct Work *work = &stream->queue[stream->done++];
        if (!is_accessible(work->target, work->size, 1) ||
            (work->kind == COPY && !is_accessible(work->source, work->size, 0)))
            return lose_context(CUDA_ERROR_ILLEGAL_ADDRESS);
        void *target = (void *)(uintptr_t)work->target;
        if (work->kind == FILL)
            memset(target, work->value, work->size);
        else
            memmove(target, (void *)(uintptr_t)work->source, work->size);
    }
    return CUDA_SUCCESS;
}

static CUresult submit(CUstream handle, struct Work work) {
    struct Stream *stream = stream_of(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing)
        return CUDA_SUCCESS; /* part of the graph: nothing runs */
    REFUSE_IF(!is_accessible(work.target, work.size, 1));
    REFUSE_IF(work.kind == COPY && !is_accessible(work.source, work.size, 0));
    if (stream->submitted == stream->capacity) {
        stream->capacity = stream->capacity ? 2 * stream->capacity : 64;
        stream->queue = realloc(stream->queue, stream->capacity * sizeof *stream->queue);
        if (!stream->queue)
            abort();
    }
    stream->queue[stream->submitted++] = work;
    return CUDA_SUCCESS;
}

CUresult finish_all_streams(void) {
    for (struct Stream *stream = streams; stream; stream = stream->next) {
        if (stream->capturing)
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        CUresult result = run_until(stream, stream->submitted);
        if (result)
            return result;
    }
    return CUDA_SUCCESS;
}

/* -- streams ------------------------------------------------------------------------------------------------------ */

EXPORT CUresult cuStreamCreate(CUstream *handle, unsigned int flags) {
    CALL(cuStreamCreate, IN_CONTEXT);
    REFUSE_IF(!handle || flags > 1);
    struct Stream *stream = calloc(1, sizeof *stream);
    if (!stream)
        return CUDA_ERROR_OUT_OF_MEMORY;
    stream->next = streams;
    *handle = streams = stream;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
    CALL(cuStreamDestroy, IN_CONTEXT);
    struct Stream *stream = stream_of(handle);
    if (!stream || stream == &null_stream)
        return CUDA_ERROR_INVALID_HANDLE;
    CUresult result = run_until(stream, stream->submitted);
    struct Stream **link = &streams;
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    free(stream->queue);
    free(stream);
    return result;
}

EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    CALL(cuStreamSynchronize, IN_CONTEXT);
    struct Stream *stream = stream_of(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return run_until(stream, stream->submitted);
}

EXPORT CUresult cuStreamQuery(CUstream handle) {
    CALL(cuStreamQuery, IN_CONTEXT);
    struct Stream *stream = stream_of(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    return stream->done < stream->submitted ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream handle, int *status) {
    CALL(cuStreamIsCapturing, IN_CONTEXT);
    struct Stream *stream = stream_of(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    REFUSE_IF(!status);
    *status = stream->capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned int flags) {
    CALL(cuStreamWaitEvent, IN_CONTEXT);
    struct Stream *stream = stream_of(handle);
    if (!stream || !event)
        return CUDA_ERROR_INVALID_HANDLE;
    REFUSE_IF(flags > 1);
    return event->stream ? run_until(event->stream, event->position) : CUDA_SUCCESS;
}

/* -- events ------------------------------------------------------------------------------------------------------- */

EXPORT CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    CALL(cuEventCreate, IN_CONTEXT);
    REFUSE_IF(!event || flags > 7);
    *event = calloc(1, sizeof **event);
    return *event ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuEventDestroy_v2(CUevent event) {
    CALL(cuEventDestroy, IN_CONTEXT);
    REFUSE_IF(!event);
    free(event);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream handle) {
    CALL(cuEventRecord, IN_CONTEXT);
    struct Stream *stream = stream_of(handle);
    if (!stream || !event)
        return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) { /* the event becomes part of the graph, and can be waited for no more */
        event->stream = stream;
        event->position = SIZE_MAX;
        return CUDA_SUCCESS;
    }
    event->stream = stream;
    event->position = stream->submitted;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    CALL(cuEventSynchronize, IN_CONTEXT);
    if (!event)
        return CUDA_ERROR_INVALID_HANDLE;
    if (event->position == SIZE_MAX)
        return 907; /* CUDA_ERROR_CAPTURED_EVENT */
    return event->stream ? run_until(event->stream, event->position) : CUDA_SUCCESS;
}

/* Nothing goes on by itself here, so asking does a little. */
EXPORT CUresult cuEventQuery(CUevent event) {
    CALL(cuEventQuery, IN_CONTEXT);
    if (!event)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!event->stream || event->stream->done >= event->position)
        return CUDA_SUCCESS;
    CUresult result = run_until(event->stream, event->stream->done + 1);
    return result ? result : CUDA_ERROR_NOT_READY;
}

/* -- work --------------------------------------------------------------------------------------------------------- */

EXPORT CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t size, CUstream stream) {
    CALL(cuMemsetD8Async, IN_CONTEXT);
    return submit(stream, (struct Work){FILL, value, target, 0, size});
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    CALL(cuMemcpyDtoDAsync, IN_CONTEXT);
    return submit(stream, (struct Work){COPY, 0, target, source, size});
}

EXPORT CUresult cuMemsetD8_v2(CUdeviceptr target, unsigned char value, size_t size) {
    CALL(cuMemsetD8, IN_CONTEXT);
    CUresult result = submit(NULL, (struct Work){FILL, value, target, 0, size});
    return result ? result : finish_all_streams();
}

EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t size) {
    CALL(cuMemcpyDtoD, IN_CONTEXT);
    CUresult result = submit(NULL, (struct Work){COPY, 0, target, source, size});
    return result ? result : finish_all_streams();
}

/* -- for tests ---------------------------------------------------------------------------------------------------- */

void forget_work(void) {
    for (struct Stream *stream = streams; stream; stream = stream->next) {
        stream->done = stream->submitted;
        stream->capturing = 0;
    }
}

EXPORT int emulation_capture(CUstream handle, int capturing) {
    struct Stream *stream = stream_of(handle);
    if (!stream)
        return -1;
    stream->capturing = capturing;
    return 0;
}

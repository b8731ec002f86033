/* Virtual memory: handles are ranges of one sparse memory file, mapping is mmap, access is mprotect.
 *
 * Addresses without a handle behind them, or without access, are PROT_NONE, so that touching them kills the process, as
 * it kills a CUDA context. Nothing of it is inherited by a forked child. */
#define _GNU_SOURCE
#include "emulation.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Physical memory made by cuMemCreate. It goes when it is neither held nor mapped. */
struct Handle {
    size_t size;
    off_t offset; /* in the memory file */
    CUdevice device;
    int held, mapped;
};

struct Range {
    CUdeviceptr address;
    size_t size;
    size_t handle; /* of a mapping */
    int access;    /* of a mapping */
};

/* Ranges by ascending address, without overlap. */
struct Ranges {
    struct Range *items;
    size_t count, capacity;
};

static struct Ranges reservations, mappings;
static struct Handle *handles; /* never reused, so that a stale handle is noticed; handle 0 is none */
static size_t handle_count = 1, handle_capacity;
static size_t used[MAX_DEVICES];
static off_t file_end;

size_t allocated_bytes(CUdevice device) {
    size_t sum = 0;
    for (int number = 0; number < MAX_DEVICES; number++)
        if (device < 0 || device == number)
            sum += used[number];
    return sum;
}

/* -- books -------------------------------------------------------------------------------------------------------- */

static void *grown(void *items, size_t *capacity, size_t count, size_t size) {
    if (count < *capacity)
        return items;
    *capacity = *capacity ? 2 * *capacity : 256;
    items = realloc(items, *capacity * size);
    if (!items)
        abort();
    return items;
}

/* Index of the first range that ends behind `address`. */
static size_t find(const struct Ranges *ranges, CUdeviceptr address) {
    size_t low = 0, high = ranges->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges->items[middle].address + ranges->items[middle].size <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void insert(struct Ranges *ranges, struct Range range) {
    ranges->items = grown(ranges->items, &ranges->capacity, ranges->count, sizeof range);
    size_t at = find(ranges, range.address);
    memmove(ranges->items + at + 1, ranges->items + at, (ranges->count - at) * sizeof range);
    ranges->items[at] = range;
    ranges->count++;
}

static void take_out(struct Ranges *ranges, size_t at, size_t count) {
    memmove(ranges->items + at, ranges->items + at + count, (ranges->count - at - count) * sizeof *ranges->items);
    ranges->count -= count;
}

static int overlaps(const struct Ranges *ranges, CUdeviceptr address, size_t size) {
    size_t at = find(ranges, address);
    return at < ranges->count && ranges->items[at].address < address + size;
}

/* How many whole mappings make up exactly [address, address + size), from index `first` on; 0 where they do not. */
static size_t whole_mappings(CUdeviceptr address, size_t size, size_t *first) {
    CUdeviceptr end = address + size;
    size_t at = *first = find(&mappings, address);
    while (address < end && at < mappings.count && mappings.items[at].address == address)
        address += mappings.items[at++].size;
    return address == end ? at - *first : 0;
}

static struct Handle *handle_of(CUmemGenericAllocationHandle number) {
    return number && number < handle_count && (handles[number].held || handles[number].mapped) ? &handles[number] : NULL;
}

int is_accessible(CUdeviceptr address, size_t size, int write) {
    CUdeviceptr end = address + size;
    int needed = write ? CU_MEM_ACCESS_READWRITE : CU_MEM_ACCESS_READ;
    for (size_t at = find(&mappings, address); address < end; at++) {
        if (at == mappings.count || mappings.items[at].address > address)
            return 0;
        if ((mappings.items[at].access & needed) != needed)
            return 0;
        address = mappings.items[at].address + mappings.items[at].size;
    }
    return 1;
}

/* -- the system --------------------------------------------------------------------------------------------------- */

static int file(void) {
    static int fd = -1;
    if (fd < 0) {
        fd = memfd_create("emulated-cuda", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, (off_t)1 << 62))
            abort();
    }
    return fd;
}

static int show_nothing(CUdeviceptr address, size_t size) {
    void *at = (void *)(uintptr_t)address;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap(at, size, PROT_NONE, flags, -1, 0) == MAP_FAILED || madvise(at, size, MADV_DONTFORK);
}

static int show_file(CUdeviceptr address, size_t size, off_t offset) {
    void *at = (void *)(uintptr_t)address;
    return mmap(at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, file(), offset) == MAP_FAILED ||
           madvise(at, size, MADV_DONTFORK);
}

/* New memory on a device holds what was there before. */
static int fill(off_t offset, size_t size) {
    static char garbage[64 << 10];
    memset(garbage, settings.fill, sizeof garbage);
    for (size_t done = 0; done < size;) {
        size_t part = size - done < sizeof garbage ? size - done : sizeof garbage;
        ssize_t written = pwrite(file(), garbage, part, offset + (off_t)done);
        if (written <= 0)
            return -1;
        done += (size_t)written;
    }
    return 0;
}

static void give_back(struct Handle *handle) {
    if (handle->held || handle->mapped)
        return;
    fallocate(file(), FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, handle->offset, (off_t)handle->size);
    used[handle->device] -= handle->size;
}

/* -- addresses ---------------------------------------------------------------------------------------------------- */

EXPORT CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t size, size_t alignment, CUdeviceptr hint,
                                    unsigned long long flags) {
    CALL(cuMemAddressReserve, IN_CONTEXT);
    (void)hint;
    REFUSE_IF(!pointer || !size || size % settings.granularity || flags || (alignment & (alignment - 1)));
    if (alignment < settings.granularity)
        alignment = settings.granularity;
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *found = mmap(NULL, size + alignment, PROT_NONE, kind, -1, 0);
    if (found == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    size_t before = (alignment - (uintptr_t)found % alignment) % alignment;
    if (before)
        munmap(found, before);
    munmap(found + before + size, alignment - before);
    madvise(found + before, size, MADV_DONTFORK);
    *pointer = (uintptr_t)found + before;
    insert(&reservations, (struct Range){*pointer, size, 0, 0});
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) {
    CALL(cuMemAddressFree, IN_CONTEXT);
    size_t at = find(&reservations, pointer);
    REFUSE_IF(at == reservations.count);
    REFUSE_IF(reservations.items[at].address != pointer || reservations.items[at].size != size);
    REFUSE_IF(overlaps(&mappings, pointer, size));
    munmap((void *)(uintptr_t)pointer, size);
    take_out(&reservations, at, 1);
    return CUDA_SUCCESS;
}

/* -- physical memory ---------------------------------------------------------------------------------------------- */

static int is_supported(const CUmemAllocationProp *prop) {
    return prop && prop->type == CU_MEM_ALLOCATION_TYPE_PINNED && prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE &&
           !prop->win32HandleMetaData;
}

static int is_known(const CUmemLocation *location) {
    return location->type == CU_MEM_LOCATION_TYPE_DEVICE && location->id >= 0 && location->id < settings.devices;
}

EXPORT CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop, int option) {
    CALL(cuMemGetAllocationGranularity, INITIALIZED);
    REFUSE_IF(!granularity || !is_supported(prop) || !is_known(&prop->location));
    REFUSE_IF(option != CU_MEM_ALLOC_GRANULARITY_MINIMUM && option != CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    *granularity = settings.granularity;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *number, size_t size, const CUmemAllocationProp *prop,
                            unsigned long long flags) {
    CALL(cuMemCreate, IN_CONTEXT);
    REFUSE_IF(!number || !size || size % settings.granularity || flags || !is_supported(prop));
    if (!is_known(&prop->location))
        return CUDA_ERROR_INVALID_DEVICE;
    CUdevice device = prop->location.id;
    if (used[device] + size > settings.memory || fallocate(file(), 0, file_end, (off_t)size))
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (settings.fill >= 0 && fill(file_end, size))
        return CUDA_ERROR_OPERATING_SYSTEM;
    handles = grown(handles, &handle_capacity, handle_count, sizeof *handles);
    handles[handle_count] = (struct Handle){size, file_end, device, 1, 0};
    file_end += (off_t)size;
    used[device] += size;
    *number = handle_count++;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle number) {
    CALL(cuMemRelease, IN_CONTEXT);
    struct Handle *handle = handle_of(number);
    REFUSE_IF(!handle || !handle->held);
    handle->held--;
    give_back(handle);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    CALL(cuMemGetInfo, IN_CONTEXT);
    REFUSE_IF(!available || !total);
    *total = settings.memory;
    *available = settings.memory - used[current_context()->device];
    return CUDA_SUCCESS;
}

/* -- mapping ------------------------------------------------------------------------------------------------------ */

EXPORT CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle number,
                         unsigned long long flags) {
    CALL(cuMemMap, IN_CONTEXT);
    struct Handle *handle = handle_of(number);
    REFUSE_IF(!handle || !handle->held || offset || flags || size != handle->size || pointer % settings.granularity);
    size_t around = find(&reservations, pointer);
    REFUSE_IF(around == reservations.count);
    const struct Range *reservation = &reservations.items[around];
    REFUSE_IF(reservation->address > pointer || pointer + size > reservation->address + reservation->size);
    REFUSE_IF(overlaps(&mappings, pointer, size));
    if (show_file(pointer, size, handle->offset))
        return CUDA_ERROR_OUT_OF_MEMORY;
    handle->mapped++;
    insert(&mappings, (struct Range){pointer, size, number, CU_MEM_ACCESS_NONE});
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
    CALL(cuMemUnmap, IN_CONTEXT);
    size_t first, count = whole_mappings(pointer, size, &first);
    REFUSE_IF(!count);
    if (show_nothing(pointer, size))
        return CUDA_ERROR_OUT_OF_MEMORY;
    for (size_t at = first; at < first + count; at++) {
        struct Handle *handle = &handles[mappings.items[at].handle];
        handle->mapped--;
        give_back(handle);
    }
    take_out(&mappings, first, count);
    return fails_after("cuMemUnmap");
}

EXPORT CUresult cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc *descriptors, size_t count) {
    CALL(cuMemSetAccess, IN_CONTEXT);
    REFUSE_IF(!descriptors || !count);
    size_t first, whole = whole_mappings(pointer, size, &first);
    REFUSE_IF(!whole);
    int protection = PROT_NONE;
    for (size_t index = 0; index < count; index++) {
        const CUmemAccessDesc *descriptor = &descriptors[index];
        REFUSE_IF(!is_known(&descriptor->location));
        REFUSE_IF(descriptor->flags != CU_MEM_ACCESS_NONE && descriptor->flags != CU_MEM_ACCESS_READ &&
                  descriptor->flags != CU_MEM_ACCESS_READWRITE);
        protection |= descriptor->flags == CU_MEM_ACCESS_READWRITE ? PROT_READ | PROT_WRITE
                      : descriptor->flags == CU_MEM_ACCESS_READ    ? PROT_READ
                                                                   : PROT_NONE;
    }
    if (mprotect((void *)(uintptr_t)pointer, size, protection))
        return CUDA_ERROR_OUT_OF_MEMORY;
    int access = protection & PROT_WRITE ? CU_MEM_ACCESS_READWRITE
                 : protection            ? CU_MEM_ACCESS_READ
                                         : CU_MEM_ACCESS_NONE;
    for (size_t at = first; at < first + whole; at++)
        mappings.items[at].access = access;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr pointer) {
    CALL(cuMemGetAccess, IN_CONTEXT);
    REFUSE_IF(!flags || !location || !is_known(location));
    size_t at = find(&mappings, pointer);
    REFUSE_IF(at == mappings.count || mappings.items[at].address > pointer);
    *flags = (unsigned long long)mappings.items[at].access;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *number, void *address) {
    CALL(cuMemRetainAllocationHandle, IN_CONTEXT);
    CUdeviceptr pointer = (uintptr_t)address;
    size_t at = find(&mappings, pointer);
    REFUSE_IF(!number || at == mappings.count || mappings.items[at].address > pointer);
    handles[mappings.items[at].handle].held++;
    *number = mappings.items[at].handle;
    return CUDA_SUCCESS;
}

/* -- for tests ---------------------------------------------------------------------------------------------------- */

void forget_memory(void) {
    for (size_t at = 0; at < mappings.count; at++)
        show_nothing(mappings.items[at].address, mappings.items[at].size);
    mappings.count = 0;
    for (size_t number = 1; number < handle_count; number++)
        if (handles[number].held || handles[number].mapped) {
            handles[number].held = handles[number].mapped = 0;
            give_back(&handles[number]);
        }
}

/* Copy out the mappings in [address, address + size): start, handle, size and access of each. Returns how many. */
EXPORT size_t emulation_mappings(CUdeviceptr address, size_t size, unsigned long long (*out)[4], size_t room) {
    __attribute__((cleanup(emulation_leave), unused)) int held = 1;
    emulation_enter("", ANYTIME);
    size_t count = 0;
    for (size_t at = find(&mappings, address); at < mappings.count && mappings.items[at].address < address + size; at++) {
        if (count < room) {
            const struct Range *mapping = &mappings.items[at];
            out[count][0] = mapping->address;
            out[count][1] = mapping->handle;
            out[count][2] = mapping->size;
            out[count][3] = (unsigned long long)mapping->access;
        }
        count++;
    }
    return count;
}

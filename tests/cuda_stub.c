/* A libcudart and libcuda in one that write down what they are called with, for tests/test_runtime_cudart.py.
 *
 * NVIDIA_HEADERS: compile against NVIDIA's own prototypes, so that the compiler holds these against them.
 * RUNTIME, DRIVER: the versions it says it is, such as 12060; DRIVER 0 is a machine without one.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#ifdef NVIDIA_HEADERS
#include <cuda.h>
#include <cuda_runtime_api.h>
#else
#include <stddef.h>
#define CUDARTAPI
#define CUDAAPI
#define cudaSuccess 0
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuCtxPushCurrent cuCtxPushCurrent_v2
#define cuCtxPopCurrent cuCtxPopCurrent_v2
typedef int cudaError_t, CUresult, CUdevice;
typedef int cudaDeviceAttr, cudaMemcpyKind, cudaStreamCaptureMode, cudaStreamCaptureStatus;
typedef void *cudaStream_t, *cudaEvent_t, *cudaGraph_t, *cudaGraphExec_t, *CUcontext;
struct cudaDeviceProp {
    char name[256];
    char more[700];
};
#define enum
#endif

static char called[256];
static int code;

const char *stub_called(void) { return called; }
void stub_fail(int with) { code = with; }

static int note(const char *form, ...) {
    va_list values;
    va_start(values, form);
    vsnprintf(called, sizeof called, form, values);
    va_end(values);
    return code;
}

#define HANDLE(n) ((void *)(0x7fedcba900000000ull + (n)))
#define P(pointer) ((unsigned long long)(pointer))

cudaError_t CUDARTAPI cudaRuntimeGetVersion(int *version) { return *version = RUNTIME, cudaSuccess; }
cudaError_t CUDARTAPI cudaDriverGetVersion(int *version) { return *version = DRIVER, cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError(void) { return note("cudaGetLastError"); }
const char *CUDARTAPI cudaGetErrorName(cudaError_t error) {
    return (int)error == 2 ? "cudaErrorMemoryAllocation" : "unrecognized error code";
}
const char *CUDARTAPI cudaGetErrorString(cudaError_t error) {
    return (int)error == 2 ? "out of memory" : "unrecognized error code";
}
cudaError_t CUDARTAPI cudaGetDeviceCount(int *count) { return *count = 3, note("cudaGetDeviceCount"); }
cudaError_t CUDARTAPI cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0xff, sizeof *properties);
    strcpy(properties->name, "Orin");
    return note("cudaGetDeviceProperties %d", device);
}
cudaError_t CUDARTAPI cudaDeviceGetPCIBusId(char *address, int length, int device) {
    snprintf(address, length, "0001:02:03.0");
    return note("cudaDeviceGetPCIBusId %d %d", length, device);
}
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    return *value = attribute - 67, note("cudaDeviceGetAttribute %d %d", attribute, device);
}
cudaError_t CUDARTAPI cudaDeviceSynchronize(void) { return note("cudaDeviceSynchronize"); }

cudaError_t CUDARTAPI cudaMalloc(void **address, size_t size) {
    return *address = HANDLE(1), note("cudaMalloc %llx", P(size));
}
cudaError_t CUDARTAPI cudaFree(void *address) { return note("cudaFree %llx", P(address)); }
cudaError_t CUDARTAPI cudaHostAlloc(void **address, size_t size, unsigned int flags) {
    static char memory[64];
    return *address = memory, note("cudaHostAlloc %llx %x", P(size), flags);
}
cudaError_t CUDARTAPI cudaFreeHost(void *address) { return note("cudaFreeHost %llx", P(address)); }
cudaError_t CUDARTAPI cudaMemcpyAsync(
    void *target, const void *source, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return note("cudaMemcpyAsync %llx %llx %llx %d %llx", P(target), P(source), P(size), kind, P(stream));
}

cudaError_t CUDARTAPI cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int flags) {
    return *stream = HANDLE(2), note("cudaStreamCreateWithFlags %x", flags);
}
cudaError_t CUDARTAPI cudaStreamDestroy(cudaStream_t stream) { return note("cudaStreamDestroy %llx", P(stream)); }
cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t stream) {
    return note("cudaStreamSynchronize %llx", P(stream));
}
cudaError_t CUDARTAPI cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
    return note("cudaStreamWaitEvent %llx %llx %x", P(stream), P(event), flags);
}
cudaError_t CUDARTAPI cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return *status = 1, note("cudaStreamIsCapturing %llx", P(stream));
}
cudaError_t CUDARTAPI cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    return note("cudaStreamBeginCapture %llx %d", P(stream), mode);
}
cudaError_t CUDARTAPI cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    return *graph = HANDLE(3), note("cudaStreamEndCapture %llx", P(stream));
}

cudaError_t CUDARTAPI cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) {
    return *event = HANDLE(4), note("cudaEventCreateWithFlags %x", flags);
}
cudaError_t CUDARTAPI cudaEventDestroy(cudaEvent_t event) { return note("cudaEventDestroy %llx", P(event)); }
cudaError_t CUDARTAPI cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return note("cudaEventRecord %llx %llx", P(event), P(stream));
}
cudaError_t CUDARTAPI cudaEventSynchronize(cudaEvent_t event) {
    return note("cudaEventSynchronize %llx", P(event));
}
cudaError_t CUDARTAPI cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    return *ms = 1.5f, note("cudaEventElapsedTime %llx %llx", P(start), P(end));
}

cudaError_t CUDARTAPI cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return *executable = HANDLE(5), note("cudaGraphInstantiate %llx %llx", P(graph), flags);
}
cudaError_t CUDARTAPI cudaGraphDestroy(cudaGraph_t graph) { return note("cudaGraphDestroy %llx", P(graph)); }
cudaError_t CUDARTAPI cudaGraphExecDestroy(cudaGraphExec_t executable) {
    return note("cudaGraphExecDestroy %llx", P(executable));
}
cudaError_t CUDARTAPI cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    return note("cudaGraphLaunch %llx %llx", P(executable), P(stream));
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char **name) {
    *name = (int)error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : NULL;
    return *name ? 0 : 1;
}
CUresult CUDAAPI cuInit(unsigned int flags) { return note("cuInit %x", flags); }
CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) { return *device = 7, note("cuDeviceGet %d", ordinal); }
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return *context = HANDLE(6), note("cuDevicePrimaryCtxRetain %d", device);
}
CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) { return note("cuDevicePrimaryCtxRelease %d", device); }
CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) { return note("cuCtxPushCurrent %llx", P(context)); }
CUresult CUDAAPI cuCtxPopCurrent(CUcontext *context) { return *context = HANDLE(6), note("cuCtxPopCurrent"); }

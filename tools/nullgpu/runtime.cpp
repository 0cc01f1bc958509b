// The CUDA runtime: memory is reserved, not committed; copies between host and device are made; kernels are written
// down.
#include "device.h"
extern "C" {
void nullgpu_mark(const char* text) {
    say("MARK %s", text);
    if (out) fflush(out);
}
long nullgpu_used() { return used; }
// ---- runtime: device
cudaError_t cudaGetDeviceCount(int* n) {
    *n = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
    *d = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
static void fill(cudaDeviceProp* p) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, hopper() ? "NVIDIA H100 80GB HBM3" : "NVIDIA A100-SXM4-80GB");
    p->totalGlobalMem = TOTAL;
    p->sharedMemPerBlock = 49152;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = cc() / 10;
    p->minor = cc() % 10;
    p->multiProcessorCount = hopper() ? 132 : 108;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerMultiprocessor = hopper() ? 233472 : 167936;
    p->sharedMemPerBlockOptin = hopper() ? 232448 : 166912;
    p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = hopper() ? 50 << 20 : 40 << 20;
    p->memoryBusWidth = 5120;
    p->unifiedAddressing = 1;
    p->concurrentKernels = 1;
    p->canMapHostMemory = 1;
    p->maxBlocksPerMultiProcessor = 32;
    p->textureAlignment = 512;
    p->reservedSharedMemPerBlock = 1024;
    p->cooperativeLaunch = 1;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    fill(p);
    return cudaSuccess;
}
int attribute(int a) {
    cudaDeviceProp p;
    fill(&p);
    switch (a) {
        case cudaDevAttrMaxThreadsPerBlock:
            return 1024;
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY:
            return 1024;
        case cudaDevAttrMaxBlockDimZ:
            return 64;
        case cudaDevAttrMaxGridDimX:
            return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ:
            return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            return 49152;
        case cudaDevAttrWarpSize:
            return 32;
        case cudaDevAttrMaxRegistersPerBlock:
            return 65536;
        case cudaDevAttrClockRate:
            return 1980000;
        case cudaDevAttrMemoryClockRate:
            return 2619000;
        case cudaDevAttrGlobalMemoryBusWidth:
            return 5120;
        case cudaDevAttrMultiProcessorCount:
            return p.multiProcessorCount;
        case cudaDevAttrL2CacheSize:
            return p.l2CacheSize;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            return 2048;
        case cudaDevAttrComputeCapabilityMajor:
            return p.major;
        case cudaDevAttrComputeCapabilityMinor:
            return p.minor;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            return p.sharedMemPerMultiprocessor;
        case cudaDevAttrMaxRegistersPerMultiprocessor:
            return 65536;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return p.sharedMemPerBlockOptin;
        case cudaDevAttrCooperativeLaunch:
            return 1;
        case cudaDevAttrUnifiedAddressing:
            return 1;
        case cudaDevAttrMaxBlocksPerMultiprocessor:
            return 32;
        case cudaDevAttrReservedSharedMemoryPerBlock:
            return 1024;
        case cudaDevAttrMemoryPoolsSupported:
            return 1;
    }
    return 0;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
    *v = attribute(a);
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) {
    *v = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int) {
    snprintf(s, n, "0000:00:00.0");
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
    *a = 0;
    *b = -5;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t e) { return e ? "null GPU refused" : "no error"; }
const char* cudaGetErrorName(cudaError_t e) { return e ? "cudaErrorNull" : "cudaSuccess"; }
cudaError_t cudaDeviceSynchronize() {
    if (capturing) return refuse("cudaDeviceSynchronize");
    say("SYNC device");
    return cudaSuccess;
}
// ---- runtime: memory
cudaError_t cudaMalloc(void** p, size_t n) {
    if (used + n > TOTAL) {
        *p = nullptr;
        say("OOM %zu on top of %zu", n, used);
        return cudaErrorMemoryAllocation;
    }
    *p = grab(n, 'D');
    say("MALLOC %zu", n);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void* p) {
    if (p) say("FREE");
    drop(p);
    return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
    drop(p);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
    *p = grab(n, 'P');
    say("HOSTALLOC %zu", n);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
cudaError_t cudaFreeHost(void* p) {
    drop(p);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
    std::lock_guard<std::recursive_mutex> l(guard);
    ranges()[(uintptr_t)p] = {n, 'P'};
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
    std::lock_guard<std::recursive_mutex> l(guard);
    ranges().erase((uintptr_t)p);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
    *t = TOTAL;
    *f = TOTAL - used;
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { return copy(d, s, n, false); }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) {
    return copy(d, s, n, true);
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind,
                              cudaStream_t) {
    for (size_t i = 0; i < h; i++) memcpy((char*)d + i * dp, (const char*)s + i * sp, w);
    say("COPY2D");
    return cudaSuccess;
}
cudaError_t cudaMemset(void* d, int v, size_t n) {
    if (n <= (1 << 20)) memset(d, v, n);
    say("MEMSET %zu", n);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) { return cudaMemset(d, v, n); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    char k = kind_of(p);
    a->type = k == 'D' ? cudaMemoryTypeDevice : k == 'P' ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    if (k != 'H') a->devicePointer = (void*)p;
    if (k == 'P') a->hostPointer = (void*)p;
    a->device = k == 'H' ? -1 : 0;
    return cudaSuccess;
}
// ---- runtime: streams, events, capture
cudaError_t cudaStreamCreate(cudaStream_t* s) {
    *s = fresh<cudaStream_t>();
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
    *p = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    if (capturing) return refuse("cudaStreamSynchronize");
    say("SYNC stream");
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
    *s = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id, cudaGraph_t* g,
                                     const cudaGraphNode_t** d, const cudaGraphEdgeData** e, size_t* n) {
    *s = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = capturing;
    if (g) *g = (cudaGraph_t)1;
    if (d) *d = nullptr;
    if (e) *e = nullptr;
    if (n) *n = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    static int id = 0;
    capturing = ++id;
    say("CAPTURE begin");
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* g) {
    capturing = 0;
    *g = fresh<cudaGraph_t>();
    say("CAPTURE end");
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
    *e = fresh<cudaGraphExec_t>();
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    say("GRAPH launch");
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) {
    *n = 1;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* e) {
    *e = fresh<cudaEvent_t>();
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
    *ms = 0.01f;
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    if (capturing) return refuse("cudaEventSynchronize");
    say("SYNC event");
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) {
    if (capturing) return refuse("cudaEventQuery");
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* d) {
    f(d);
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* d, unsigned) {
    f(s, cudaSuccess, d);
    return cudaSuccess;
}
// ---- runtime: kernels
void** __cudaRegisterFatBinary(void*) {
    static void* h;
    return &h;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    std::lock_guard<std::recursive_mutex> l(guard);
    names()[host] = device;
}
static thread_local std::vector<std::tuple<dim3, dim3, size_t, cudaStream_t>> pushed;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, cudaStream_t t) {
    pushed.emplace_back(g, b, s, t);
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* t) {
    auto [x, y, z, w] = pushed.back();
    pushed.pop_back();
    *g = x;
    *b = y;
    *s = z;
    *(cudaStream_t*)t = w;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
    *k = (cudaKernel_t)f;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void**, size_t s, cudaStream_t) {
    if (tracing) launch("aten", demangled(name_of((void*)k)).c_str(), g, b, s);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t s, cudaStream_t) {
    if (tracing) launch("aten", demangled(name_of(f)).c_str(), g, b, s);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
    if (tracing) launch("aten", demangled(name_of(f)).c_str(), c->gridDim, c->blockDim, c->dynamicSmemBytes);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = cc();
    a->ptxVersion = cc();
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
    *n = 2;
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void*) {
    *p = grab(4096, 'D');
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* n, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* r) {
    *f = dlsym(RTLD_DEFAULT, n);
    if (!*f) {
        std::string v = std::string(n) + "_v2";
        *f = dlsym(RTLD_DEFAULT, v.c_str());
    }
    if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    if (!*f) say("ENTRY missing %s", n);
    return *f ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
    *p = (cudaMemPool_t)1;
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* v) {
    *(unsigned long*)v = 0;
    return cudaSuccess;
}
}  // extern "C"

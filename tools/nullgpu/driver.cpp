// The CUDA driver, as Triton and torch call it.
#include "device.h"
extern "C" {
// ---- driver
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* v) {
    *v = 13000;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* n) {
    *n = 1;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* d, int) {
    *d = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* s, int n, CUdevice) {
    snprintf(s, n, "null");
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
    *v = attribute(a);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* c) {
    *c = (CUcontext)1;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* d) {
    *d = 0;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) {
    *c = (CUcontext)1;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* a) {
    *f = 0;
    *a = 1;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult e, const char** s) {
    *s = e ? "null GPU refused" : "no error";
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* m, const void*) {
    *m = fresh<CUmodule>();
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) {
    *m = fresh<CUmodule>();
    return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* m, const char*) {
    *m = fresh<CUmodule>();
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
static std::unordered_map<void*, std::string>& functions() {
    static auto* f = new std::unordered_map<void*, std::string>;
    return *f;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* n) {
    *f = fresh<CUfunction>();
    std::lock_guard<std::recursive_mutex> l(guard);
    functions()[*f] = n;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
    *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
static void driver_launch(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned s) {
    if (tracing) launch("triton", functions()[f].c_str(), dim3(gx, gy, gz), dim3(bx, by, bz), s);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned s, CUstream, void**, void**) {
    driver_launch(f, gx, gy, gz, bx, by, bz, s);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
    driver_launch(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                  c->sharedMemBytes);
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
    *n = 2;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
    *n = 2;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
    if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
        if (kind_of((void*)p) == 'H') return CUDA_ERROR_INVALID_VALUE;
        *(CUdeviceptr*)v = p;
    } else
        *(unsigned*)v = 0;
    return CUDA_SUCCESS;
}
CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t, CUstream) { return CUDA_SUCCESS; }
CUresult cuGetProcAddress_v2(const char* n, void** f, int, cuuint64_t, CUdriverProcAddressQueryResult* r) {
    *f = dlsym(RTLD_DEFAULT, n);
    if (r) *r = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
}  // extern "C"

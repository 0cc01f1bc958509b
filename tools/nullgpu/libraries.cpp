// cuBLAS, cuDNN and NCCL: every product, plan and collective is written down.
#include "device.h"
#define __CUDA_FP16_H__  // no device code here: the two types suffice
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half {
    unsigned short x;
};
struct __half2 {
    __half x, y;
};
struct __nv_bfloat16 {
    unsigned short x;
};
typedef __half half;
#include <cublasLt.h>
#include <cublas_v2.h>
extern "C" {
// ---- cuBLAS
cublasStatus_t cublasCreate_v2(cublasHandle_t* h) {
    *h = fresh<cublasHandle_t>();
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* m) {
    *m = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* m) {
    *m = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void*, const void*, cudaDataType a, int, const void*, cudaDataType b, int,
                            const void*, void*, cudaDataType c, int, cublasComputeType_t t, cublasGemmAlgo_t) {
    say("KERNEL gemm cublasGemmEx %c%c m=%d n=%d k=%d types=%d,%d,%d compute=%d", ta ? 'T' : 'N', tb ? 'T' : 'N', m, n,
        k, a, b, c, t);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                              const float*, const float*, int, const float*, int, const float*, float*, int) {
    say("KERNEL gemm cublasSgemm %c%c m=%d n=%d k=%d", ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, k);
    return CUBLAS_STATUS_SUCCESS;
}
static std::unordered_map<void*, std::string>& described() {
    static auto* d = new std::unordered_map<void*, std::string>;
    return *d;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t t, cudaDataType_t) {
    *d = fresh<cublasLtMatmulDesc_t>();
    described()[*d] = "compute=" + std::to_string(t);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void* b,
                                              size_t n) {
    if (a == CUBLASLT_MATMUL_DESC_EPILOGUE) described()[d] += " epilogue=" + std::to_string(*(int*)b);
    if (a == CUBLASLT_MATMUL_DESC_TRANSA) described()[d] += *(int*)b ? " T" : " N";
    if (a == CUBLASLT_MATMUL_DESC_TRANSB) described()[d] += *(int*)b ? "T" : "N";
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType t, uint64_t r, uint64_t c, int64_t) {
    *l = fresh<cublasLtMatrixLayout_t>();
    described()[*l] = std::to_string(r) + "x" + std::to_string(c) + ":" + std::to_string(t);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
    *p = fresh<cublasLtMatmulPreference_t>();
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t r[],
                                              int* n) {
    memset(r, 0, sizeof *r);
    *n = 1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void*, const void*,
                              cublasLtMatrixLayout_t a, const void*, cublasLtMatrixLayout_t b, const void*, const void*,
                              cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t c, const cublasLtMatmulAlgo_t*,
                              void*, size_t, cudaStream_t) {
    say("KERNEL gemm cublasLt %s A=%s B=%s D=%s", described()[d].c_str(), described()[(void*)a].c_str(),
        described()[(void*)b].c_str(), described()[(void*)c].c_str());
    return CUBLAS_STATUS_SUCCESS;
}
}  // extern "C"
// ---- cuDNN: enough for its front end to build and run one attention plan
#include <cudnn.h>
extern "C" {
size_t cudnnGetVersion() { return 92400; }
size_t cudnnGetCudartVersion() { return 13000; }
cudnnStatus_t cudnnGetProperty(libraryPropertyType t, int* v) {
    *v = t == MAJOR_VERSION ? 9 : t == MINOR_VERSION ? 24 : 0;
    return CUDNN_STATUS_SUCCESS;
}
const char* cudnnGetErrorString(cudnnStatus_t s) { return s ? "null cuDNN refused" : "CUDNN_STATUS_SUCCESS"; }
void cudnnGetLastErrorString(char* s, size_t n) {
    if (n) *s = 0;
}
cudnnStatus_t cudnnCreate(cudnnHandle_t* h) {
    *h = fresh<cudnnHandle_t>();
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t, cudaStream_t* s) {
    *s = nullptr;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t* d) {
    *d = fresh<cudnnBackendDescriptor_t>();
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t asked, int64_t* count, void* values) {
    bool result = name == CUDNN_ATTR_ENGINEHEUR_RESULTS;
    if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {
        if (count)
            *count = result || name == CUDNN_ATTR_ENGINECFG_ENGINE || name == CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG
                         ? 1
                         : 0;
        return CUDNN_STATUS_SUCCESS;
    }
    if (type == CUDNN_TYPE_INT64 || type == CUDNN_TYPE_INT32) {
        if (count) *count = asked > 0 ? 1 : 0;
        if (values && asked > 0) memset(values, 0, type == CUDNN_TYPE_INT64 ? 8 : 4);
        return CUDNN_STATUS_SUCCESS;
    }
    if (count) *count = 0;
    if (type == CUDNN_TYPE_CHAR && values && asked > 0) {
        *(char*)values = 0;
    }
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t) {
    say("KERNEL cudnn execute");
    return CUDNN_STATUS_SUCCESS;
}
}
// ---- NCCL: one process; collectives are written down
extern "C" {
int ncclGetVersion(int* v) {
    *v = 23007;
    return 0;
}
int ncclGetUniqueId(void* id) {
    memset(id, 0, 128);
    return 0;
}
int ncclCommInitRank(void** c, int, ...) {
    *c = fresh<void*>();
    return 0;
}
int ncclCommInitRankConfig(void** c, int, ...) {
    *c = fresh<void*>();
    return 0;
}
int ncclCommInitRankScalable(void** c, int, ...) {
    *c = fresh<void*>();
    return 0;
}
int ncclCommSplit(void*, int, int, void** c, void*) {
    *c = fresh<void*>();
    return 0;
}
int ncclCommGetAsyncError(void*, int* e) {
    *e = 0;
    return 0;
}
const char* ncclGetErrorString(int) { return "null"; }
const char* ncclGetLastError(void*) { return ""; }
int ncclAllReduce(const void* s, void* d, size_t n, int t, int, void*, void*) {
    say("NCCL all-reduce n=%zu type=%d", n, t);
    return 0;
}
int ncclAllGather(const void* s, void* d, size_t n, int t, void*, void*) {
    say("NCCL all-gather n=%zu type=%d", n, t);
    return 0;
}
int ncclReduceScatter(const void* s, void* d, size_t n, int t, int, void*, void*) {
    say("NCCL reduce-scatter n=%zu type=%d", n, t);
    return 0;
}
int ncclBroadcast(const void* s, void* d, size_t n, int t, int, void*, void*) {
    say("NCCL broadcast n=%zu type=%d", n, t);
    return 0;
}
}

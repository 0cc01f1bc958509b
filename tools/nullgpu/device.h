// What the parts of the device share: the trace, the memory map, and handles that mean nothing.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>
#undef cudaGetDeviceProperties
inline std::recursive_mutex guard;
inline FILE* out = nullptr;
inline int cc() {
    static int v = [] {
        const char* s = getenv("NULLGPU_CC");
        return s ? atoi(s) : 90;
    }();
    return v;
}
inline bool hopper() { return cc() >= 90; }
inline const bool tracing = getenv("NULLGPU_TRACE") != nullptr;
inline void say(const char* format, ...) {
    if (!tracing) return;
    std::lock_guard<std::recursive_mutex> lock(guard);
    if (!out) {
        const char* p = getenv("NULLGPU_TRACE");
        out = p ? fopen(p, "a") : fopen("/dev/null", "w");
        setvbuf(out, nullptr, _IOFBF, 1 << 16);
        atexit([] { fflush(out); });
    }
    va_list a;
    va_start(a, format);
    vfprintf(out, format, a);
    va_end(a);
    fputc('\n', out);
}
struct Range {
    size_t size;
    char kind;
};
inline std::map<uintptr_t, Range>& ranges() {
    static auto* r = new std::map<uintptr_t, Range>;
    return *r;
}
inline char kind_of(const void* p) {  // D device, P pinned, H pageable
    std::lock_guard<std::recursive_mutex> lock(guard);
    auto it = ranges().upper_bound((uintptr_t)p);
    if (it == ranges().begin()) return 'H';
    --it;
    return (uintptr_t)p < it->first + it->second.size ? it->second.kind : 'H';
}
inline size_t used = 0;
inline const size_t TOTAL = 80ull << 30;
inline void* grab(size_t size, char kind) {
    size = (size + 4095) & ~size_t(4095);
    void* p =
        mmap(nullptr, size + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    p = (void*)(((uintptr_t)p + (2 << 20) - 1) & ~uintptr_t((2 << 20) - 1));
    std::lock_guard<std::recursive_mutex> lock(guard);
    ranges()[(uintptr_t)p] = {size, kind};
    if (kind == 'D') used += size;
    return p;
}
inline void drop(void* p) {
    std::lock_guard<std::recursive_mutex> lock(guard);
    auto it = ranges().find((uintptr_t)p);
    if (it == ranges().end()) return;
    if (it->second.kind == 'D') used -= it->second.size;
    munmap(p, it->second.size);
    ranges().erase(it);
}
inline std::unordered_map<const void*, const char*>& names() {
    static auto* n = new std::unordered_map<const void*, const char*>;
    return *n;
}
inline std::string demangled(const char* n) {
    int s;
    char* d = abi::__cxa_demangle(n, nullptr, nullptr, &s);
    std::string r = s ? n : d;
    free(d);
    return r;
}
inline const char* name_of(const void* f) {
    auto it = names().find(f);
    return it == names().end() ? "?" : it->second;
}
inline thread_local int capturing = 0;
inline long handles = 0x1000;
template <class T>
T fresh() {
    return (T)(handles += 64);
}
inline cudaError_t refuse(const char* what) {
    say("CAPTURE-ILLEGAL %s", what);
    return cudaErrorStreamCaptureUnsupported;
}
inline void launch(const char* how, const char* name, dim3 g, dim3 b, size_t shared) {
    say("KERNEL %s grid=%u,%u,%u block=%u,%u,%u shared=%zu %s", how, g.x, g.y, g.z, b.x, b.y, b.z, shared, name);
}
inline cudaError_t copy(void* d, const void* s, size_t n, bool async) {
    char to = kind_of(d), from = kind_of(s);
    if (capturing && (to == 'H' || from == 'H')) return refuse("copy from or to pageable memory");
    bool waits = !async || to == 'H';  // an asynchronous copy to pageable memory returns when it is done
    say("COPY %c->%c %zu%s%s", from, to, n, async ? "" : " sync",
        waits && (to != 'D' || !async) ? " WAITS"
        : from == 'H' && to == 'D'     ? " STAGED"
                                       : "");
    if (from == 'D' && to != 'D' && n <= 4096)
        memset(d, 0, n);  // what kernels did not compute reads as zero
    else if (!(to == 'D' && from == 'D'))
        memcpy(d, s, n);
    else if (n <= (1 << 20))
        memcpy(d, s, n);
    return cudaSuccess;
}
extern "C" int attribute(int a);  // of the device, by the number that runtime and driver share

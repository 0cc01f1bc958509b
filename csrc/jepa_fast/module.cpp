// jepa_fast_C: what of the data pipeline is too slow in Python. Use it through jepa_fast.data.

#include "module.h"

PYBIND11_MODULE(jepa_fast_C, m) {
    m.doc() = "Headers of shards, image resize, mask sampler, packing; use them through jepa_fast.data.";
    m.attr("ABI") = 3;
    define_headers(m);
    define_masks(m);
    define_packing(m);
    define_resize(m);
}

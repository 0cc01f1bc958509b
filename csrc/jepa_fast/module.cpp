// jepa_fast_C: what of the data pipeline is too slow in Python. Use it through jepa_fast.data.

#include "module.h"

PYBIND11_MODULE(jepa_fast_C, m) {
    m.doc() = "Mask sampler and image resize; use them through jepa_fast.data.masks and jepa_fast.data.images.";
    m.attr("ABI") = 2;
    define_masks(m);
    define_resize(m);
}

// Index rows of a mask plan: the arithmetic of `indices_by_numpy` in jepa_fast/masks/packing.py, outside Python's lock.

#include <cstdint>
#include <limits>
#include <stdexcept>

#include "module.h"

namespace {

using Numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

template <class T>
py::array_t<T> array(int64_t count) {
    return py::array_t<T>(static_cast<py::ssize_t>(count));
}

// Of lengths that lie in [0, most]; -1 if one does not, or the total.
int64_t total(const Numbers& lengths, int64_t most) {
    int64_t sum = 0;
    for (py::ssize_t i = 0; i < lengths.size(); ++i) {
        const int64_t length = lengths.data()[i];
        if (length < 0 || length > most - sum) return -1;
        sum += length;
    }
    return sum;
}

py::dict indices(const Numbers& context, const Numbers& context_lengths, const Numbers& targets,
                 const Numbers& target_lengths, int64_t blocks, int64_t num_tokens) {
    const int64_t images = context_lengths.size(), tc = context.size(), tt = targets.size();
    const int64_t *in_context = context_lengths.data(), *in_target = target_lengths.data();
    // Ends of sequences are int32: all that is counted below must fit.
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    if (blocks < 1 || blocks > most || images > most / blocks || tc > most / blocks || tt > most - blocks * tc ||
        num_tokens < 0 || num_tokens > std::numeric_limits<int64_t>::max() / 2 / (images + 1))
        throw std::invalid_argument("more tokens than one batch can hold");
    for (const Numbers* tokens : {&context, &targets})
        for (py::ssize_t i = 0; i < tokens->size(); ++i)
            if (tokens->data()[i] < 0 || tokens->data()[i] >= num_tokens)
                throw std::invalid_argument("a token lies outside its image");
    if (target_lengths.size() != images || total(context_lengths, tc) != tc ||
        total(target_lengths, tt / blocks) * blocks != tt)
        throw std::invalid_argument("lengths do not add up to the tokens");
    auto context_rows = array<int64_t>(tc), target_rows = array<int64_t>(tt);
    auto order = array<int64_t>(blocks * tc + tt), mask_rows = array<int64_t>(tt);
    auto context_cu = array<int32_t>(images + 1), target_cu = array<int32_t>(images * blocks + 1);
    auto predictor_cu = array<int32_t>(images * blocks + 1);
    auto weight = array<float>(tt);
    int64_t *c = context_rows.mutable_data(), *t = target_rows.mutable_data();
    int64_t *o = order.mutable_data(), *m = mask_rows.mutable_data();
    int32_t *c_cu = context_cu.mutable_data(), *t_cu = target_cu.mutable_data(), *p_cu = predictor_cu.mutable_data();
    float* w = weight.mutable_data();
    const int64_t *context_token = context.data(), *target_token = targets.data();
    {
        const py::gil_scoped_release release;
        int64_t begin = 0, target = 0, place = 0;  // of the image's context, of the next mask token, in `order`
        *c_cu++ = *t_cu++ = *p_cu++ = 0;
        for (int64_t image = 0; image < images; ++image) {
            const int64_t end = begin + in_context[image], total = blocks * in_target[image];
            const auto share = static_cast<float>(1.0 / static_cast<double>(images * total));
            for (int64_t i = begin; i < end; ++i) *c++ = image * num_tokens + *context_token++;
            *c_cu++ = static_cast<int32_t>(end);
            for (int64_t i = 0; i < total; ++i, *w++ = share) *t++ = image * num_tokens + *target_token++;
            for (int64_t block = 0; block < blocks; ++block) {  // a sequence: the context, then the block's mask tokens
                for (int64_t i = begin; i < end; ++i, ++place) *o++ = i;
                for (int64_t i = 0; i < in_target[image]; ++i, ++place, ++target) {
                    *o++ = tc + target;
                    *m++ = place;
                }
                *t_cu++ = static_cast<int32_t>(target);
                *p_cu++ = static_cast<int32_t>(place);
            }
            begin = end;
        }
    }
    using namespace py::literals;
    return py::dict("context_rows"_a = context_rows, "context_cu"_a = context_cu, "target_rows"_a = target_rows,
                    "target_weight"_a = weight, "predictor_order"_a = order, "predictor_targets"_a = mask_rows,
                    "predictor_cu"_a = predictor_cu, "target_cu"_a = target_cu);
}

}  // namespace

void define_packing(py::module_& m) {
    m.def("indices", &indices, py::arg("context"), py::arg("context_lengths"), py::arg("targets"),
          py::arg("target_lengths"), py::arg("num_targets"), py::arg("num_tokens"));
}

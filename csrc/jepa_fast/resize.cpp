// Antialiased resize of uint8 images: Pillow's, bit for bit, at several times its rate.
//
// In: uint8 [H, W, C], C 1 or 3; possibly a crop of a larger image, of which nothing else is read. Out: uint8 [C, size,
// size]. Rows first and rounded, then columns, by 22-bit fixed-point weights of a filter that is stretched by the
// scale: the arithmetic of Pillow's Image.resize, which is the reference of the tests.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "module.h"

namespace {

constexpr int kBits = 22;  // of a weight of 1: 255 times it, with the overshoot of a cubic, stays below 2^31
constexpr int32_t kHalf = 1 << (kBits - 1);
constexpr int kStep = 32;  // bytes that are summed at once

double linear(double x) { return std::max(0.0, 1 - std::abs(x)); }

double cubic(double x) {  // Keys 1981, a = -1/2
    x = std::abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
}

// Two weights, each of 2^16 times a high part and a low one: as AVX2 multiplies with them.
struct Pair {
    int8_t high[4] = {};  // both, twice
    int16_t low[2] = {};
    void set(int which, int32_t weight) {
        low[which] = static_cast<int16_t>(weight);
        high[which] = high[which + 2] = static_cast<int8_t>((weight - low[which]) >> 16);
    }
    int32_t get(int which) const { return high[which] * (1 << 16) + low[which]; }
};

// Of each pixel of the output: the first pixel it is made of, how many, and their weights.
struct Taps {
    std::vector<int64_t> first;
    std::vector<int> count;
    std::vector<Pair> weights;
    int64_t most;  // pairs of weights to a pixel

    Taps(int64_t from, int64_t to, bool is_cubic) : first(to), count(to) {
        const double scale = static_cast<double>(from) / static_cast<double>(to), stretch = std::max(scale, 1.0);
        const double support = (is_cubic ? 2.0 : 1.0) * stretch;
        most = static_cast<int64_t>(std::ceil(support)) + 1;
        weights.resize(to * most);
        std::vector<double> exact(2 * most);
        for (int64_t i = 0; i < to; ++i) {
            const double center = (static_cast<double>(i) + 0.5) * scale;
            first[i] = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
            count[i] = static_cast<int>(std::min(from, static_cast<int64_t>(center + support + 0.5)) - first[i]);
            double sum = 0;
            for (int k = 0; k < count[i]; ++k) {
                // as Pillow rounds: not divided by the stretch
                const double x = (static_cast<double>(first[i] + k) - center + 0.5) * (1 / stretch);
                sum += exact[k] = is_cubic ? cubic(x) : linear(x);
            }
            for (int k = 0; k < count[i]; ++k) {
                const double weight = exact[k] / sum * (1 << kBits);
                weights[i * most + k / 2].set(k % 2, static_cast<int32_t>(weight + (weight < 0 ? -0.5 : 0.5)));
            }
        }
    }

    int64_t size() const { return static_cast<int64_t>(first.size()); }
    const Pair* weights_of(int64_t i) const { return weights.data() + i * most; }
    int32_t weight(int64_t i, int k) const { return weights_of(i)[k / 2].get(k % 2); }
};

struct Picture {
    const uint8_t* pixels;
    int64_t height, width, stride;  // bytes from row to row
};

struct Passes {
    using Across = void (*)(Picture, const Taps&, uint8_t* columns, uint8_t* turned, uint8_t* out, int64_t plane);
    Across across1, across3;
    void (*down)(const uint8_t* from, int64_t stride, int64_t bytes, const Taps&, uint8_t* out);
};

#define NAMESPACE baseline
#define TARGET
#include "resize_pass.h"
#if defined(__x86_64__)
#include "resize_avx2.h"
#define NAMESPACE v2
#define TARGET __attribute__((target("sse4.2")))
#include "resize_pass.h"
#endif

// {name, passes} of what this processor has, best last.
std::vector<std::pair<std::string, const Passes*>> instruction_sets() {
    std::vector<std::pair<std::string, const Passes*>> found = {{"baseline", &baseline::kPasses}};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2")) found.emplace_back("x86-64-v2", &v2::kPasses);
    if (__builtin_cpu_supports("avx2")) found.emplace_back("x86-64-v3", &v3::kPasses);
#endif
    return found;
}

const Passes& passes_named(const std::string& name) {
    static const auto sets = instruction_sets();
    for (auto set = sets.rbegin(); set != sets.rend(); ++set)
        if (name.empty() || name == set->first) return *set->second;
    throw std::invalid_argument("this processor has no " + name);
}

// Pillow 13's choice of what comes first; older ones always begin with the rows.
bool begins_with_columns(const Picture& from, int64_t size) {
    return from.height - size > 2 * std::max<int64_t>(0, from.width - size);
}

void run(const Passes& wanted, const Picture& from, int64_t channels, int64_t size, bool is_cubic, uint8_t* out) {
    const bool fills_a_step = std::min({from.height, from.width * channels, size}) >= kStep;  // AVX2's take no less
    const Passes& passes = fills_a_step ? wanted : baseline::kPasses;
    const Taps x(from.width, size, is_cubic), y(from.height, size, is_cubic);
    const auto across = channels == 1 ? passes.across1 : passes.across3;
    const int64_t bytes = from.width * channels, columns = (bytes + 7) * kStep, turned = (channels * size + 7) * kStep;
    const bool columns_first = begins_with_columns(from, size);
    static thread_local std::vector<uint8_t> memory;  // kept: fresh pages cost as much as a pass
    memory.resize(
        std::max<size_t>(memory.size(), columns + turned + size * (columns_first ? bytes : channels * from.height)));
    uint8_t *side = memory.data(), *other_side = side + columns, *middle = other_side + turned;
    if (columns_first) {
        passes.down(from.pixels, from.stride, bytes, y, middle);
        across({middle, size, from.width, bytes}, x, side, other_side, out, size * size);
    } else {
        across(from, x, side, other_side, middle, from.height * size);
        for (int64_t c = 0; c < channels; ++c)
            passes.down(middle + c * from.height * size, size, size, y, out + c * size * size);
    }
}

using Image = py::array_t<uint8_t, 0>;

Image resize(Image image, int64_t size, bool is_cubic, const std::string& instructions, std::optional<Image> into) {
    if (image.ndim() != 3 || (image.shape(2) != 1 && image.shape(2) != 3) || image.size() == 0 || size < 1)
        throw std::invalid_argument("give uint8 [H, W, 1 or 3] with at least one pixel, and a size of at least 1");
    const int64_t channels = image.shape(2);
    if (image.strides(1) != channels || (channels > 1 && image.strides(2) != 1) || image.strides(0) < 0)
        image = py::array_t<uint8_t, py::array::c_style>(image);
    const Passes& passes = passes_named(instructions);
    const Picture from = {image.data(), image.shape(0), image.shape(1), image.strides(0)};
    Image out = into ? *into : Image({channels, size, size});
    if (out.ndim() != 3 || out.shape(0) != channels || out.shape(1) != size || out.shape(2) != size ||
        out.strides(2) != 1 || out.strides(1) != size || out.strides(0) != size * size)
        throw std::invalid_argument("out must be contiguous uint8 [C, size, size]");
    uint8_t* to = out.mutable_data();
    {  // nothing of Python's in here, and nothing returned from here: a conversion would count references unlocked
        const py::gil_scoped_release release;
        run(passes, from, channels, size, is_cubic, to);
    }
    return out;
}

}  // namespace

void define_resize(py::module_& m) {
    m.def("resize", &resize, py::arg("image"), py::arg("size"), py::arg("cubic"), py::arg("instructions") = "",
          py::arg("out").noconvert() = py::none());
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const auto& set : instruction_sets()) names.push_back(set.first);
        return names;
    });
}

// Mask sampler: which tokens of each image are context and which are targets.
//
// In: one 64-bit stream key per row, block sizes. Out: ragged token numbers, int64, rows one after the other.
// The same draws as jepa_fast/masks/reference.py, bit for bit, which is why there is no floating point here:
// scales, aspects and probabilities arrive as whole numbers. Serial: a batch takes less time than waking threads.

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "module.h"

namespace {

using Numbers = std::vector<int64_t>;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr int64_t kMost = int64_t{1} << 31;  // tokens of a grid, targets, tries: more would not fit into memory
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// splitmix64's finaliser (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// splitmix64 from a key.
class Stream {
 public:
    explicit Stream(uint64_t key) : state_(key) {}

    uint64_t next() { return mix(state_ += kGolden); }

    // In [0, n), by multiply-shift of the upper 32 bits; uneven by at most n / 2^32.
    int64_t below(int64_t n) { return static_cast<int64_t>(((next() >> 32) * static_cast<uint64_t>(n)) >> 32); }

 private:
    uint64_t state_;
};

struct Drawn {
    Numbers context, context_lengths, targets, target_lengths;
    bool found = true;  // false: a row used up its tries
};

struct Size {
    int64_t height, width;
};

// A block of the grid by its first token.
template <class Visit>
void each_row(int64_t corner, Size block, int64_t columns, Visit visit) {
    for (int64_t r = 0; r < block.height; ++r) visit(corner + r * columns, corner + r * columns + block.width);
}

// Selection sampling (Knuth 3.4.2 S): visit(i, chosen) for i in [0, n), a uniformly random k of them chosen.
template <class Visit>
void choose(Stream* stream, int64_t n, int64_t k, Visit visit) {
    for (int64_t i = 0, left = k; i < n; ++i) {
        const bool chosen = stream->below(n - i) < left;
        left -= chosen;
        visit(i, chosen);
    }
}

class Blocks {
 public:
    Blocks(Size grid, Size within, int64_t num_targets, int64_t need, int64_t keep, int64_t tries)
        : grid_(grid),
          within_(within),
          need_(need),
          keep_(keep),
          tries_(tries),
          corners_(num_targets),
          visible_(grid.height * grid.width) {}

    // Appends one image to out; false after `tries` draws of its locations.
    bool draw(Stream stream, Size target, Size context, Drawn* out) {
        int64_t count = 0, tries = 0;
        do {
            if (tries++ == tries_) return false;
            for (int64_t& corner : corners_) corner = draw_corner(&stream, target);
            count = mark(draw_corner(&stream, context), target, context);
        } while (count < need_);
        append_context(&stream, count, out);
        for (int64_t corner : corners_)
            each_row(corner, target, grid_.width, [&](int64_t begin, int64_t end) {
                for (int64_t token = begin; token < end; ++token) out->targets.push_back(token);
            });
        out->target_lengths.push_back(target.height * target.width);
        return true;
    }

 private:
    int64_t draw_corner(Stream* stream, Size block) const {
        const int64_t top = stream->below(within_.height - block.height + 1);
        return top * grid_.width + stream->below(within_.width - block.width + 1);
    }

    // Marks the context block less the targets; the number of its tokens.
    int64_t mark(int64_t corner, Size target, Size context) {
        std::fill(visible_.begin(), visible_.end(), uint8_t{0});
        fill(corner, context, 1);
        for (int64_t hidden : corners_) fill(hidden, target, 0);
        return std::accumulate(visible_.begin(), visible_.end(), int64_t{0});
    }

    void fill(int64_t corner, Size block, uint8_t value) {
        each_row(corner, block, grid_.width, [&](int64_t begin, int64_t end) {
            std::fill(visible_.begin() + begin, visible_.begin() + end, value);
        });
    }

    void append_context(Stream* stream, int64_t count, Drawn* out) {
        const auto n = static_cast<int64_t>(visible_.size());
        const size_t begin = out->context.size();
        for (int64_t token = 0; token < n; ++token)
            if (visible_[token]) out->context.push_back(token);
        if (keep_) {  // moved together in place: what is kept never overtakes what is read
            int64_t* tokens = out->context.data() + begin;
            int64_t* end = tokens;
            choose(stream, count, keep_, [&](int64_t i, bool chosen) {
                if (chosen) *end++ = tokens[i];
            });
            out->context.resize(begin + keep_);
        }
        out->context_lengths.push_back(static_cast<int64_t>(out->context.size() - begin));
    }

    Size grid_, within_;
    int64_t need_, keep_, tries_;
    Numbers corners_;
    std::vector<uint8_t> visible_;
};

// Appends a row whose hidden tokens are its target and whose others are its context.
void append_split(const std::vector<uint8_t>& hidden, Drawn* out) {
    const int64_t count = std::accumulate(hidden.begin(), hidden.end(), int64_t{0});
    for (size_t token = 0; token < hidden.size(); ++token)
        (hidden[token] ? out->targets : out->context).push_back(static_cast<int64_t>(token));
    out->target_lengths.push_back(count);
    out->context_lengths.push_back(static_cast<int64_t>(hidden.size()) - count);
}

// ---- entry points: copy the arguments, let go of the interpreter, draw ---------------------------

template <class Draw>
py::object each_key(const Array<uint64_t>& keys, Draw draw) {
    Drawn out;
    {
        const uint64_t* key = keys.data();
        const int64_t rows = keys.size();
        py::gil_scoped_release release;
        for (int64_t row = 0; row < rows && out.found; ++row) out.found = draw(Stream(key[row]), row, &out);
    }
    if (!out.found) return py::none();
    const auto array = [](const Numbers& v) {
        return py::array_t<int64_t>(static_cast<py::ssize_t>(v.size()), v.data());
    };
    return py::make_tuple(array(out.context), array(out.context_lengths), array(out.targets),
                          array(out.target_lengths));
}

py::array_t<uint64_t> stream_keys(const py::int_& seed, uint64_t domain, const Array<int64_t>& first,
                                  const Array<int64_t>& second) {
    const py::ssize_t rows = std::max(first.size(), second.size());
    const auto of = [rows](const Array<int64_t>& numbers, py::ssize_t row) {
        if (numbers.size() != rows && numbers.size() != 1)
            throw std::invalid_argument("give as many first numbers as second");
        return static_cast<uint64_t>(numbers.data()[numbers.size() == 1 ? 0 : row]);
    };
    py::array_t<uint64_t> keys(rows);
    for (py::ssize_t row = 0; row < rows; ++row) {
        uint64_t key = PyLong_AsUnsignedLongLongMask(seed.ptr());
        for (const uint64_t number : {domain, of(first, row), of(second, row)}) key = mix(key + kGolden) ^ number;
        keys.mutable_data()[row] = mix(key);
    }
    return keys;
}

py::object draw_blocks(const Array<uint64_t>& keys, const Array<int64_t>& sizes, std::array<int64_t, 2> grid,
                       std::array<int64_t, 2> within, int64_t num_targets, int64_t need, int64_t keep, int64_t tries) {
    if (sizes.ndim() != 2 || sizes.shape(0) != keys.size() || sizes.shape(1) != 4)
        throw std::invalid_argument("sizes must be [rows, 4]");
    for (int axis = 0; axis < 2; ++axis)
        if (within[axis] < 1 || within[axis] > grid[axis] || grid[axis] > kMost)
            throw std::invalid_argument("blocks would leave the grid, or it is none");
    if (grid[1] > kMost / grid[0] || num_targets > kMost || need > grid[0] * grid[1] || tries < 1 || tries > kMost)
        throw std::invalid_argument("more tokens, targets or tries than there can be");
    if (within[0] > grid[0] || within[1] > grid[1] || num_targets < 1 || keep < 0 || keep > need)
        throw std::invalid_argument("blocks would leave the grid, or more tokens be kept than are needed");
    const int64_t* size = sizes.data();
    for (py::ssize_t i = 0; i < sizes.size(); ++i)
        if (size[i] < 1 || size[i] > within[i % 2]) throw std::invalid_argument("a block is larger than the grid");
    Blocks blocks({grid[0], grid[1]}, {within[0], within[1]}, num_targets, need, keep, tries);
    return each_key(keys, [&](Stream stream, int64_t row, Drawn* out) {
        const int64_t* s = size + 4 * row;
        return blocks.draw(stream, {s[0], s[1]}, {s[2], s[3]}, out);
    });
}

py::object draw_exact(const Array<uint64_t>& keys, int64_t num_tokens, int64_t hidden) {
    if (num_tokens < 1 || num_tokens > kMost || hidden < 0 || hidden > num_tokens)
        throw std::invalid_argument("more tokens are hidden than there are, or there are none");
    std::vector<uint8_t> mask(num_tokens);
    return each_key(keys, [&](Stream stream, int64_t, Drawn* out) {
        choose(&stream, num_tokens, hidden, [&](int64_t i, bool chosen) { mask[i] = chosen; });
        append_split(mask, out);
        return true;
    });
}

py::object draw_bernoulli(const Array<uint64_t>& keys, int64_t num_tokens, uint64_t threshold, int64_t need,
                          int64_t tries) {
    if (num_tokens < 1 || num_tokens > kMost || need < 0 || need > num_tokens || tries < 0 || tries > kMost)
        throw std::invalid_argument("more tokens or tries than there can be");
    std::vector<uint8_t> mask(num_tokens);
    return each_key(keys, [&](Stream stream, int64_t, Drawn* out) {
        for (int64_t t = 0; t < tries; ++t) {
            int64_t count = 0;
            for (uint8_t& hidden : mask) {
                hidden = (stream.next() >> 11) < threshold;
                count += hidden;
            }
            if (count < need || count > num_tokens - need) continue;
            append_split(mask, out);
            return true;
        }
        return false;
    });
}

}  // namespace

void define_masks(py::module_& m) {
    m.def("stream_keys", &stream_keys, py::arg("seed"), py::arg("domain"), py::arg("first"), py::arg("second"));
    m.def("draw_blocks", &draw_blocks, py::arg("keys"), py::arg("sizes"), py::arg("grid"), py::arg("within"),
          py::arg("num_targets"), py::arg("need"), py::arg("keep"), py::arg("tries"));
    m.def("draw_exact", &draw_exact, py::arg("keys"), py::arg("num_tokens"), py::arg("hidden"));
    m.def("draw_bernoulli", &draw_bernoulli, py::arg("keys"), py::arg("num_tokens"), py::arg("threshold"),
          py::arg("need"), py::arg("tries"));
}

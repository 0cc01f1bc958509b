// The two passes of a resize, for one instruction set: included once for each, with TARGET and NAMESPACE set.
//
// 32 bytes are summed at once, as 8 words of 4: a shift and a mask bring each byte into 32 bits of its own, so that no
// byte ever changes its place. Integers throughout: all instruction sets give the same bits.

namespace NAMESPACE {

#define INLINE TARGET __attribute__((always_inline)) inline

typedef uint32_t Words __attribute__((vector_size(kStep)));
typedef uint64_t Longs __attribute__((vector_size(kStep)));
typedef int32_t Sums __attribute__((vector_size(kStep)));

// As many bytes as there are; a copy of unknown length would be a call.
template <class Value>
INLINE Value load(const uint8_t* from, int64_t there = sizeof(Value)) {
    Value value = {};
    if (there >= static_cast<int64_t>(sizeof value))
        std::memcpy(&value, from, sizeof value);
    else
        std::memcpy(&value, from, there);
    return value;
}

template <class Value>
INLINE void store(Value value, uint8_t* to, int64_t there = sizeof(Value)) {
    if (there >= static_cast<int64_t>(sizeof value))
        std::memcpy(to, &value, sizeof value);
    else
        std::memcpy(to, &value, there);
}

// One sum for each of 32 bytes: that of byte 4 i + b is by_byte[b][i].
struct Sum {
    Sums by_byte[4];
    INLINE Sum() {
        for (Sums& sums : by_byte) sums = Sums{} + kHalf;
    }
    INLINE void add(Words pixels, int32_t weight) {
        for (int b = 0; b < 4; ++b) by_byte[b] += (Sums)(pixels >> (8 * b) & 255) * weight;
    }
    INLINE Words clipped() const {
        Words pixels = {};
        for (int b = 0; b < 4; ++b) {
            Sums sums = by_byte[b] >> kBits;
            sums &= ~(sums >> 31);  // below 0: 0
            sums |= sums > 255;     // true is -1, whose low byte is 255
            pixels |= ((Words)sums & 255) << (8 * b);
        }
        return pixels;
    }
};

// In each lane, swaps rows and columns of 8 x 8 bytes, row r in words[r]: by blocks of 4 x 4, 2 x 2, single bytes.
INLINE void turn(Longs (&words)[8]) {
    constexpr uint64_t kLow[3] = {0x00000000FFFFFFFF, 0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF};
    for (int stage = 0; stage < 3; ++stage) {
        const int step = 4 >> stage;
        for (int r = 0; r < 8; ++r)
            if (!(r & step)) {
                const Longs swapped = (words[r] >> (8 * step) ^ words[r + step]) & kLow[stage];
                words[r] ^= swapped << (8 * step);
                words[r + step] ^= swapped;
            }
    }
}

// Every row to taps.size() pixels, planes apart: out[c * plane + row * size + x]. 32 rows at a time are turned on their
// side, so that the neighbours which a sum needs lie one vector apart, whatever the number of channels.
template <int C>
TARGET void across(Picture from, const Taps& taps, uint8_t* columns, uint8_t* turned, uint8_t* out, int64_t plane) {
    const int64_t bytes = from.width * C, size = taps.size();
    Longs words[8];
    for (int64_t top = 0; top < from.height; top += kStep) {
        const int64_t count = std::min<int64_t>(kStep, from.height - top);
        const uint8_t* rows[kStep];
        for (int64_t r = 0; r < kStep; ++r) rows[r] = from.pixels + (top + std::min(r, count - 1)) * from.stride;
        for (int64_t at = 0; at < bytes; at += 8) {  // columns[byte of a row][row]
            if (at % 64 == 0)                        // so many rows at once are more than the processor foresees
                for (const uint8_t* row : rows) __builtin_prefetch(row + at + 128);
            const auto eight = [&](int row) TARGET { return load<uint64_t>(rows[row] + at, bytes - at); };
            for (int r = 0; r < 8; ++r) words[r] = Longs{eight(r), eight(8 + r), eight(16 + r), eight(24 + r)};
            turn(words);
            for (int i = 0; i < 8; ++i) store(words[i], columns + (at + i) * kStep);
        }
        for (int64_t x = 0; x < size; ++x) {
            Sum sums[C];
            const uint8_t* column = columns + taps.first[x] * C * kStep;
            for (int k = 0; k < taps.count[x]; ++k, column += C * kStep)
                for (int c = 0; c < C; ++c) sums[c].add(load<Words>(column + c * kStep), taps.weight(x, k));
            for (int c = 0; c < C; ++c) store(sums[c].clipped(), turned + (c * size + x) * kStep);
        }
        for (int c = 0; c < C; ++c)
            for (int64_t x = 0; x < size; x += 8) {
                for (int i = 0; i < 8; ++i) words[i] = load<Longs>(turned + (c * size + x + i) * kStep);
                turn(words);
                for (int64_t row = 0; row < count; ++row)
                    store(words[row % 8][row / 8], out + c * plane + (top + row) * size + x, size - x);
            }
    }
}

// Every column to taps.size() pixels: out[row * bytes + byte]; a row of `bytes` bytes holds whatever it likes.
TARGET void down(const uint8_t* from, int64_t stride, int64_t bytes, const Taps& taps, uint8_t* out) {
    for (int64_t y = 0; y < taps.size(); ++y, out += bytes) {
        for (int64_t at = 0; at < bytes; at += kStep) {
            const uint8_t* row = from + taps.first[y] * stride + at;
            Sum sum;
            for (int k = 0; k < taps.count[y]; ++k, row += stride)
                sum.add(load<Words>(row, bytes - at), taps.weight(y, k));
            store(sum.clipped(), out + at, bytes - at);
        }
    }
}

const Passes kPasses = {across<1>, across<3>, down};

#undef INLINE

}  // namespace NAMESPACE

#undef NAMESPACE
#undef TARGET

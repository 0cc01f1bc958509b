// The two passes of a resize for AVX2: what resize_pass.h does, with two taps at a time and the instructions that C++
// has no words for. Nothing is left over at an end, the last block begins earlier: it takes kStep rows, of kStep bytes.

namespace v3 {

#define TARGET __attribute__((target("avx2")))
#define INLINE TARGET __attribute__((always_inline)) inline

INLINE __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
INLINE void store(__m256i value, uint8_t* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }

INLINE __m256i load_halves(const uint8_t* low, const uint8_t* high) {
    const __m128i lower = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(lower), upper, 1);
}

INLINE void store_halves(__m256i value, uint8_t* low, uint8_t* high) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(value));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(value, 1));
}

INLINE __m256i repeat(const void* four_bytes) {
    int32_t value;
    std::memcpy(&value, four_bytes, sizeof value);
    return _mm256_set1_epi32(value);
}

// The clipped sums of 32 bytes at `tap` and of those each `step` after it, by their weights: the high parts of the
// weights in 16 bits, the low ones in 32, of which the upper 16 are then added. Exact, as all is modulo 2^16 or 2^32
// but for what cannot happen: the weights of a pixel, without their signs, add up to less than 1.3 (a cubic at an
// edge), and 255 * 1.3 * 2^(kBits - 16) is below 2^15, where two products of the high parts would be cut and the end
// would not fit.
INLINE __m256i summed(const uint8_t* tap, int64_t step, int count, const Pair* weights) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i high[2], low[4];
    for (__m256i& sums : high) sums = _mm256_set1_epi16(kHalf >> 16);
    for (__m256i& sums : low) sums = zero;
    for (int k = 0; k < count; k += 2, tap += 2 * step, ++weights) {
        const __m256i one = load(tap), other = load(k + 1 < count ? tap + step : tap);  // twice the last: it weighs 0
        const __m256i both[2] = {_mm256_unpacklo_epi8(one, other), _mm256_unpackhi_epi8(one, other)};
        const __m256i of_high = repeat(weights->high), of_low = repeat(weights->low);
        for (int i = 0; i < 2; ++i) {
            const __m256i first = _mm256_unpacklo_epi8(both[i], zero), second = _mm256_unpackhi_epi8(both[i], zero);
            high[i] = _mm256_add_epi16(high[i], _mm256_maddubs_epi16(both[i], of_high));
            low[2 * i] = _mm256_add_epi32(low[2 * i], _mm256_madd_epi16(first, of_low));
            low[2 * i + 1] = _mm256_add_epi32(low[2 * i + 1], _mm256_madd_epi16(second, of_low));
        }
    }
    for (__m256i& sums : low) sums = _mm256_srai_epi32(sums, 16);
    for (int i = 0; i < 2; ++i) {
        high[i] = _mm256_add_epi16(high[i], _mm256_packs_epi32(low[2 * i], low[2 * i + 1]));
        high[i] = _mm256_srai_epi16(high[i], kBits - 16);
    }
    return _mm256_packus_epi16(high[0], high[1]);  // which clips
}

// In each half, swaps rows and columns of 16 x 16 bytes: each time, the eight bits of a byte's index rotate by one.
INLINE void turn(__m256i (&rows)[16]) {
    for (int times = 0; times < 4; ++times) {
        __m256i turned[16];
        for (int i = 0; i < 8; ++i) {
            turned[2 * i] = _mm256_unpacklo_epi8(rows[i], rows[i + 8]);
            turned[2 * i + 1] = _mm256_unpackhi_epi8(rows[i], rows[i + 8]);
        }
        std::copy(turned, turned + 16, rows);
    }
}

template <int C>
TARGET void across(Picture from, const Taps& taps, uint8_t* columns, uint8_t* turned, uint8_t* out, int64_t plane) {
    const int64_t bytes = from.width * C, size = taps.size();
    __m256i block[16];
    for (int64_t next = 0; next < from.height; next += kStep) {
        const int64_t top = std::min(next, from.height - kStep);
        const uint8_t* rows = from.pixels + top * from.stride;
        for (int64_t next = 0; next < bytes; next += 16) {
            const int64_t at = std::min(next, bytes - 16);
            if (next % 64 == 0)
                for (int r = 0; r < kStep; ++r) __builtin_prefetch(rows + r * from.stride + at + 128);
            const uint8_t* row = rows + at;
            for (int r = 0; r < 16; ++r, row += from.stride) block[r] = load_halves(row, row + 16 * from.stride);
            turn(block);
            for (int i = 0; i < 16; ++i) store(block[i], columns + (at + i) * kStep);
        }
        for (int64_t x = 0; x < size; ++x)
            for (int c = 0; c < C; ++c)
                store(summed(columns + (taps.first[x] * C + c) * kStep, C * kStep, taps.count[x], taps.weights_of(x)),
                      turned + (c * size + x) * kStep);
        for (int c = 0; c < C; ++c)
            for (int64_t next = 0; next < size; next += 16) {
                const int64_t x = std::min(next, size - 16);
                for (int i = 0; i < 16; ++i) block[i] = load(turned + (c * size + x + i) * kStep);
                turn(block);
                uint8_t* row = out + c * plane + top * size + x;
                for (int r = 0; r < 16; ++r, row += size) store_halves(block[r], row, row + 16 * size);
            }
    }
}

TARGET void down(const uint8_t* from, int64_t stride, int64_t bytes, const Taps& taps, uint8_t* out) {
    for (int64_t y = 0; y < taps.size(); ++y, out += bytes)
        for (int64_t next = 0; next < bytes; next += kStep) {
            const int64_t at = std::min(next, bytes - kStep);
            store(summed(from + taps.first[y] * stride + at, stride, taps.count[y], taps.weights_of(y)), out + at);
        }
}

const Passes kPasses = {across<1>, across<3>, down};

#undef INLINE
#undef TARGET

}  // namespace v3

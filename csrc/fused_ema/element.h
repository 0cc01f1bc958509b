// The three element types: how each is loaded as float32 and stored back, rounded to nearest, ties to even.
// Written with integers only, so that every compiler vectorises them and none needs hardware half precision.
#pragma once

#include <cstdint>
#include <cstring>

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct Float32 {
    using Stored = float;
    static float load(float value) { return value; }
    static float store(float value) { return value; }
};

struct BFloat16 {
    using Stored = uint16_t;
    static float load(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }
    static uint16_t store(float value) {
        const uint32_t bits = to_bits(value);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        return static_cast<uint16_t>(is_nan ? ((bits >> 16) | 0x40) : rounded);
    }
};

struct Float16 {
    using Stored = uint16_t;
    static float load(uint16_t half) {
        const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
        const float small = static_cast<float>(static_cast<int32_t>(rest)) * 5.9604644775390625e-08f;  // rest * 2^-24
        const uint32_t normal = (rest << 13) + 0x38000000;
        const uint32_t special = 0x7f800000 | (rest << 13);
        return from_bits(sign | (rest < 0x400 ? to_bits(small) : rest < 0x7c00 ? normal : special));
    }
    static uint16_t store(float value) {
        const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
        const uint32_t small = to_bits(from_bits(rest) + 0.5f) - 0x3f000000;  // the adder rounds at 2^-24
        const uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
        const uint32_t nan_or_inf = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
        return static_cast<uint16_t>(sign | (rest < 0x38800000 ? small : rest < 0x477ff000 ? normal : nan_or_inf));
    }
};

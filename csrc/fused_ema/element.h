// The three element types: how a vector of them is loaded as float32 and stored back, rounded to nearest, ties to even.
//
// Included once for each instruction set, by pass.h, into a namespace of its own; TARGET names the set and LANES the
// float32 of a register. Vectors are the compilers' own (GCC's and clang's) and conversions are integers only: no
// intrinsics, no hardware half precision, one source for x86-64 and aarch64.

#define INLINE TARGET __attribute__((always_inline)) inline

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint32_t UnsignedWords __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class Vector>
INLINE Vector read(const void* address) {
    Vector value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class Vector>
INLINE void write(void* address, Vector value) {
    std::memcpy(address, &value, sizeof value);
}

INLINE Words widen(Halves half) { return (Words) __builtin_convertvector(half, UnsignedWords); }
INLINE Halves narrow(Words word) { return __builtin_convertvector((UnsignedWords)word, Halves); }

struct Float32 {
    using Stored = float;
    static INLINE Floats load(const float* from) { return read<Floats>(from); }
    static INLINE Floats store(Floats value, float* to) {
        write(to, value);
        return value;
    }
};

// store returns what was stored, as float32 again.
struct BFloat16 {
    using Stored = uint16_t;
    static INLINE Floats load(const uint16_t* from) { return widened(read<Halves>(from)); }
    static INLINE Floats store(Floats value, uint16_t* to) {
        const Words bits = (Words)value, odd = (bits >> 16) & 1;
        const Words is_nan = (bits & 0x7fffffff) > 0x7f800000;
        const Words rounded = ((is_nan ? bits | 0x400000 : bits + 0x7fff + odd) >> 16) & 0xffff;
        write(to, narrow(rounded));
        return (Floats)(rounded << 16);
    }
    static INLINE Floats widened(Halves half) { return (Floats)(widen(half) << 16); }
};

struct Float16 {
    using Stored = uint16_t;
    static INLINE Floats load(const uint16_t* from) { return widened(widen(read<Halves>(from))); }
    static INLINE Floats store(Floats value, uint16_t* to) {
        const Words bits = (Words)value, sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
        const Words small = (Words)((Floats)rest + 0.5f) - 0x3f000000;  // the adder rounds at 2^-24
        const Words normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
        const Words special = rest > 0x7f800000 ? sign - sign + 0x7e00 : sign - sign + 0x7c00;
        const Words half = sign | (rest < 0x38800000 ? small : rest < 0x477ff000 ? normal : special);
        write(to, narrow(half));
        return widened(half);
    }
    static INLINE Floats widened(Words half) {
        const Words sign = (half & 0x8000) << 16, rest = half & 0x7fff;
        const Words small = (Words)(__builtin_convertvector(rest, Floats) * 5.9604644775390625e-08f);  // rest * 2^-24
        const Words normal = (rest << 13) + 0x38000000, special = 0x7f800000 | (rest << 13);
        return (Floats)(sign | (rest < 0x400 ? small : rest < 0x7c00 ? normal : special));
    }
};

// Elementwise functions: value and derivative, for host and device.  There is one functor per function; a new
// activation needs one more (gradkern/ir/functions.py has the same in torch).  Derivatives at kinks follow torch, op by
// op.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GK_HD __host__ __device__ __forceinline__
#else
#define GK_HD inline __attribute__((always_inline))
#endif

namespace gradkern {

// Names in this order are the codes of the field `function`.
// clang-format off
#define GRADKERN_FUNCTIONS(X) \
  X(relu) X(leaky_relu) X(elu) X(tanh) X(sigmoid) X(affine) X(gelu) X(gelu_tanh) X(silu) X(mish) X(softplus) \
  X(hardtanh) X(clamp) X(hardswish) X(hardsigmoid) X(square) X(power) X(negative_part) X(exp) X(expm1) X(log) \
  X(log1p) X(sqrt) X(rsqrt) X(reciprocal) X(abs) X(erf) X(sin) X(cos)
// clang-format on

enum class Fn : int64_t {
#define X(name) name,
  GRADKERN_FUNCTIONS(X)
#undef X
};

template <class T>
struct ValueAndDerivative {
  T y, d;  // f(x), f'(x)
};

// e^x and e^x - 1, each without cancellation.  In double, libm's.  In float, a branch-free form that the compiler can
// vectorize: x = n ln 2 + r, a polynomial of degree 6 in r (Cephes' coefficients), and n put into the exponent.  Error
// below 2 ulp; results are clamped to the normal range, NaN stays NaN.
template <class T>
struct Exponential {
  T e, m1;
};
GK_HD Exponential<double> exponential(double x) {
  x = x > 700.0 ? 700.0 : x;
  const double m1 = std::expm1(x);
  return {m1 > -0.5 ? m1 + 1.0 : std::exp(x), m1};
}
GK_HD Exponential<float> exponential(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r;  // e^r - 1
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;  // the constant's own low bits are zero, so this is (n + 127) << 23
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return {(p + 1.0f) * scale, p * scale + (scale - 1.0f)};
}

// e^x alone; below float's normal range it is zero, as for entries that a mask removes from a softmax.
GK_HD double power_of_e(double x) { return std::exp(x); }
GK_HD float power_of_e(float x) {
  const float e = exponential(x).e;
  return x < -87.3f ? 0.0f : e;
}

// The error function.  In double, libm's.  In float, Abramowitz and Stegun 7.1.26, which the compiler can vectorize;
// its error is below 1.5e-7, an ulp of one.
GK_HD double error_function(double x) { return std::erf(x); }
GK_HD float error_function(float x) {
  const float a = x < 0 ? -x : x, t = 1.0f / (1.0f + 0.3275911f * a);
  const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const float y = 1.0f - p * exponential(-a * a).e;
  return x < 0 ? -y : y;
}

// e^x, with its limits at both infinities.
template <class T>
GK_HD T exponential_to_the_ends(T x) {
  const T infinite = T(INFINITY), e = exponential(x).e;
  return x == infinite ? infinite : (x == -infinite ? T(0) : e);
}

template <class T>
GK_HD T logistic(T x) {
  return T(1) / (T(1) + exponential_to_the_ends(-x));
}
template <class T>
GK_HD T hyperbolic_tangent(T x) {
  const T m1 = exponential(T(2) * x).m1;
  return m1 / (m1 + T(2));
}

template <Fn F>
struct Function;

template <>
struct Function<Fn::relu> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {x <= T(0) ? T(0) : x, x <= T(0) ? T(0) : T(1)};
  }
};
template <>
struct Function<Fn::leaky_relu> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T slope, T, T) {
    const T d = x > T(0) ? T(1) : slope;
    return {d * x, d};
  }
};
template <>
struct Function<Fn::elu> {  // scale (x > 0 ? x : alpha (e^(input_scale x) - 1)): ELU, SELU, CELU
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T alpha, T scale, T input_scale) {
    const auto [e, m1] = exponential(x * input_scale);
    const T left = x == -T(INFINITY) ? T(0) : e;
    return {x > T(0) ? scale * x : alpha * scale * m1, x > T(0) ? scale : alpha * scale * input_scale * left};
  }
};
template <>
struct Function<Fn::tanh> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const Exponential<T> power = exponential(T(2) * x);
    const T y = power.m1 / (power.m1 + T(2)), q = T(2) / (power.m1 + T(2));
    // In float 1 - y² would be rounding alone where y is near 1; 4 e^2x / (e^2x + 1)² is the same.
    return {y, sizeof(T) == 8 ? T(1) - y * y : power.e * q * q};
  }
};
template <>
struct Function<Fn::sigmoid> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T y = logistic(x);
    return {y, y * (sizeof(T) == 8 ? T(1) - y : exponential(-x).e * y)};  // in float 1 - y would be rounding alone
  }
};
template <>
struct Function<Fn::affine> {  // a x + b
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T a, T b, T) {
    return {a * x + b, a};
  }
};
template <>
struct Function<Fn::gelu> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T phi = T(0.5) * (T(1) + error_function(x * T(0.70710678118654752440)));
    return {x * phi, phi + x * exponential_to_the_ends(T(-0.5) * x * x) * T(0.39894228040143267794)};
  }
};
template <>
struct Function<Fn::gelu_tanh> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T k = T(0.79788456080286535588), c = T(0.044715);
    const T t = hyperbolic_tangent(k * (x + c * x * x * x));
    return {T(0.5) * x * (T(1) + t), T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * k * (T(1) + T(3) * c * x * x)};
  }
};
template <>
struct Function<Fn::silu> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T s = logistic(x);
    return {x * s, s * (T(1) + x * (T(1) - s))};
  }
};
template <>
struct Function<Fn::mish> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T soft = x > T(20) ? x : std::log1p(std::exp(x)), t = hyperbolic_tangent(soft);
    return {x * t, t + x * logistic(x) * (T(1) - t * t)};
  }
};
template <>
struct Function<Fn::softplus> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T beta, T threshold, T) {
    const bool linear = x * beta > threshold;
    return {linear ? x : std::log1p(std::exp(x * beta)) / beta, linear ? T(1) : logistic(x * beta)};
  }
};
template <>
struct Function<Fn::hardtanh> {  // slope 0 at both bounds, and at NaN
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T low, T high, T) {
    return {x < low ? low : (x > high ? high : x), x > low && x < high ? T(1) : T(0)};
  }
};
template <>
struct Function<Fn::clamp> {  // slope 1 at both bounds
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T low, T high, T) {
    return {x < low ? low : (x > high ? high : x), x >= low && x <= high ? T(1) : T(0)};
  }
};
template <>
struct Function<Fn::hardswish> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T gate = x <= T(-3) ? T(0) : (x < T(3) ? x / T(6) + T(0.5) : T(1));
    return {x * gate, x <= T(-3) ? T(0) : (x >= T(3) ? T(1) : x / T(3) + T(0.5))};
  }
};
template <>
struct Function<Fn::hardsigmoid> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T gate = x <= T(-3) ? T(0) : (x < T(3) ? x / T(6) + T(0.5) : (x >= T(3) ? T(1) : x));
    return {gate, x > T(-3) && x < T(3) ? T(1.0f / 6.0f) : T(0)};  // torch rounds its 1/6 to float, in double too
  }
};
template <>
struct Function<Fn::square> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {x * x, T(2) * x};
  }
};
// x^p.  For p = 1/2 and -1/2 torch takes roots, which differ from pow at -0 and -Inf.
template <class T>
GK_HD T power_of(T x, T p) {
  const bool root = (x == T(0) || x == -T(INFINITY)) && (p == T(0.5) || p == T(-0.5));
  return root ? (p > T(0) ? std::sqrt(x) : T(1) / std::sqrt(x)) : std::pow(x, p);
}
template <>
struct Function<Fn::power> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T p, T, T) {
    return {power_of(x, p), p * power_of(x, p - T(1))};
  }
};
template <>
struct Function<Fn::negative_part> {  // min(x, 0), slope 1 at 0
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {x > T(0) ? T(0) : x, x > T(0) ? T(0) : T(1)};
  }
};
template <>
struct Function<Fn::exp> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T y = std::exp(x);
    return {y, y};
  }
};
template <>
struct Function<Fn::expm1> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T y = std::expm1(x);
    return {y, y + T(1)};
  }
};
template <>
struct Function<Fn::log> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {std::log(x), T(1) / x};
  }
};
template <>
struct Function<Fn::log1p> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {std::log1p(x), T(1) / (x + T(1))};
  }
};
template <>
struct Function<Fn::sqrt> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T y = std::sqrt(x);
    return {y, T(0.5) / y};
  }
};
template <>
struct Function<Fn::rsqrt> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T y = T(1) / std::sqrt(x);
    return {y, T(-0.5) * y * y * y};
  }
};
template <>
struct Function<Fn::reciprocal> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    const T y = T(1) / x;
    return {y, -y * y};
  }
};
template <>
struct Function<Fn::abs> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {x < T(0) ? -x : x, x > T(0) ? T(1) : (x < T(0) ? T(-1) : T(0))};
  }
};
template <>
struct Function<Fn::erf> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {error_function(x), exponential(-x * x).e * T(1.12837916709551257390)};
  }
};
template <>
struct Function<Fn::sin> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {std::sin(x), std::cos(x)};
  }
};
template <>
struct Function<Fn::cos> {
  template <class T>
  GK_HD static ValueAndDerivative<T> at(T x, T, T, T) {
    return {std::cos(x), -std::sin(x)};
  }
};

}  // namespace gradkern

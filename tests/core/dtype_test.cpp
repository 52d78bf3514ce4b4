// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/dtype.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <set>
#include <sstream>
#include <string>
#include <vector>

using namespace dcp;

static_assert(static_cast<float>(bf16{1.5f}) == 1.5f && bf16{1.0f}.bits() == 0x3F80);
static_assert(f16{65504.0f}.bits() == 0x7BFF && f8_e4m3{448.0f}.bits() == 0x7E && f8_e5m2{57344.0f}.bits() == 0x7B);
static_assert(static_cast<float>(f8_e8m0::from_bits(127)) == 1.0f);
static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2 && sizeof(f8_e4m3) == 1 && sizeof(f8_e8m0) == 1);
static_assert(std::is_trivially_copyable_v<bf16> && std::is_trivially_copyable_v<f8_e5m2fnuz>);
static_assert(!std::is_convertible_v<float, bf16> && !std::is_convertible_v<bf16, float>);

static_assert(dtype_of<bool> == DType::boolean && dtype_of<std::byte> == DType::u8 && dtype_of<std::complex<float>> == DType::c64);
static_assert(dtype_of<std::complex<double>> == DType::c128 && dtype_of<complex_f16> == DType::c32);
static_assert(dtype_of<long> == DType::i64 && dtype_of<long long> == DType::i64 && dtype_of<unsigned long long> == DType::u64 && dtype_of<char> == (std::is_signed_v<char> ? DType::i8 : DType::u8));
static_assert(dtype_of<float const> == DType::f32 && dtype_of<bf16> == DType::bf16 && dtype_of<f4> == DType::f4);
static_assert(!is_element<long double> && !is_element<std::complex<long double>> && !is_element<void*> && !is_element<std::string>);
static_assert(std::is_same_v<storage_of<f4>, std::byte> && std::is_same_v<storage_of<f6_e2m3>, std::byte> && std::is_same_v<storage_of<bf16>, bf16>);

namespace {

// The value of a code by the definition: sign * mantissa * 2^exponent; NaN and infinity by the format's own codes.
struct Format {
  int exponent, mantissa, bias;
  bool infinities, nuz;

  double value(unsigned code) const {
    unsigned const magnitude = code & ((1u << (exponent + mantissa)) - 1);
    double const sign = (code >> (exponent + mantissa)) != 0 ? -1 : 1;
    unsigned const field = magnitude >> mantissa, fraction = magnitude & ((1u << mantissa) - 1);
    bool const top = field == (1u << exponent) - 1;
    if (nuz && sign < 0 && magnitude == 0) return std::nan("");
    if (!nuz && infinities && top) return fraction == 0 ? sign * HUGE_VAL : std::nan("");
    if (!nuz && !infinities && top && fraction == (1u << mantissa) - 1) return std::nan("");
    if (field == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
    return sign * std::ldexp((1u << mantissa) + fraction, static_cast<int>(field) - bias - mantissa);
  }
};
constexpr Format e4m3{4, 3, 7, false, false}, e5m2{5, 2, 15, true, false}, e4m3fnuz{4, 3, 8, false, true}, e5m2fnuz{5, 2, 16, false, true}, half{5, 10, 15, true, false},
    brain{8, 7, 127, true, false};

template <class T>
void check_all_codes(Format const& format) {
  unsigned const codes = 1u << (8 * sizeof(T));
  std::vector<double> positive;   // finite values, in the order of their codes
  for (unsigned code = 0; code < codes; ++code) {
    CAPTURE(code);
    T const x = T::from_bits(static_cast<typename T::bits_type>(code));
    float const value = static_cast<float>(x);
    double const wanted = format.value(code);
    if (std::isnan(wanted)) {
      REQUIRE(std::isnan(value));
      REQUIRE(std::isnan(static_cast<float>(T{value})));
      continue;
    }
    REQUIRE(static_cast<double>(value) == wanted);
    REQUIRE(std::signbit(value) == std::signbit(wanted));
    REQUIRE(T{value}.bits() == code);
    if (!std::signbit(value) && std::isfinite(value)) positive.push_back(wanted);
  }
  REQUIRE(std::is_sorted(positive.begin(), positive.end()));
  // Between neighbours: the middle goes to the even code, a float next to the middle to the nearer one. Both signs.
  for (unsigned code = 0; code + 1 < positive.size(); ++code) {
    CAPTURE(code);
    auto const middle = static_cast<float>((positive[code] + positive[code + 1]) / 2);
    REQUIRE(static_cast<double>(middle) == (positive[code] + positive[code + 1]) / 2);
    unsigned const even = code % 2 == 0 ? code : code + 1;
    auto const magnitude = [](float x) { return static_cast<double>(std::fabs(static_cast<float>(T{x}))); };
    for (float const sign : {1.0f, -1.0f}) {
      REQUIRE(magnitude(sign * middle) == positive[even]);
      REQUIRE(magnitude(sign * std::nextafter(middle, 0.0f)) == positive[code]);
      REQUIRE(magnitude(sign * std::nextafter(middle, HUGE_VALF)) == positive[code + 1]);
      REQUIRE((std::signbit(static_cast<float>(T{sign * middle})) == (sign < 0) || (format.nuz && positive[even] == 0)));
    }
  }
  // Beyond the largest: half a step more still rounds down if the largest is even, then infinity or NaN.
  double const largest = positive.back(), step = largest - positive[positive.size() - 2];
  auto const tie = static_cast<float>(largest + step / 2);
  REQUIRE(static_cast<double>(static_cast<float>(T{std::nextafter(tie, 0.0f)})) == largest);
  float const beyond = static_cast<float>(T{std::nextafter(tie, HUGE_VALF)}), infinity = static_cast<float>(T{HUGE_VALF});
  REQUIRE((format.infinities ? std::isinf(beyond) : std::isnan(beyond)));
  REQUIRE((format.infinities ? std::isinf(infinity) : std::isnan(infinity)));
  REQUIRE(std::isnan(static_cast<float>(T{std::numeric_limits<float>::quiet_NaN()})));
}

struct Edge {
  char const* name;
  std::uint32_t f32;
  unsigned e4m3, e5m2, f16, bf16;
};
// Not saturating; what NVIDIA's and the x86 conversions give.
constexpr Edge edges[] = {
    {"+0", 0x00000000, 0x00, 0x00, 0x0000, 0x0000},
    {"-0", 0x80000000, 0x80, 0x80, 0x8000, 0x8000},
    {"1", 0x3f800000, 0x38, 0x3c, 0x3c00, 0x3f80},
    {"0.5", 0x3f000000, 0x30, 0x38, 0x3800, 0x3f00},
    {"0.25 (fp4 tie)", 0x3e800000, 0x28, 0x34, 0x3400, 0x3e80},
    {"0.25+3ulp", 0x3e800003, 0x28, 0x34, 0x3400, 0x3e80},
    {"0.75 (fp4 tie)", 0x3f400000, 0x34, 0x3a, 0x3a00, 0x3f40},
    {"1.25 (fp4 tie)", 0x3fa00000, 0x3a, 0x3d, 0x3d00, 0x3fa0},
    {"1.75 (fp4 tie)", 0x3fe00000, 0x3e, 0x3f, 0x3f00, 0x3fe0},
    {"2.5 (fp4 tie)", 0x40200000, 0x42, 0x41, 0x4100, 0x4020},
    {"3.5 (fp4 tie)", 0x40600000, 0x46, 0x43, 0x4300, 0x4060},
    {"5 (fp4 tie)", 0x40a00000, 0x4a, 0x45, 0x4500, 0x40a0},
    {"5+1ulp", 0x40a00001, 0x4a, 0x45, 0x4500, 0x40a0},
    {"7", 0x40e00000, 0x4e, 0x47, 0x4700, 0x40e0},
    {"7.25 (e2m3 tie)", 0x40e80000, 0x4e, 0x47, 0x4740, 0x40e8},
    {"7.5", 0x40f00000, 0x4f, 0x48, 0x4780, 0x40f0},
    {"30 (e3m2 over)", 0x41f00000, 0x5f, 0x50, 0x4f80, 0x41f0},
    {"0.1", 0x3dcccccd, 0x1d, 0x2e, 0x2e66, 0x3dcd},
    {"0.3", 0x3e99999a, 0x2a, 0x35, 0x34cd, 0x3e9a},
    {"1/3", 0x3eaaaaab, 0x2b, 0x35, 0x3555, 0x3eab},
    {"pi", 0x40490fdb, 0x45, 0x42, 0x4248, 0x4049},
    {"2^-6", 0x3c800000, 0x08, 0x24, 0x2400, 0x3c80},
    {"2^-9", 0x3b000000, 0x01, 0x18, 0x1800, 0x3b00},
    {"2^-10 (e4m3 tie)", 0x3a800000, 0x00, 0x14, 0x1400, 0x3a80},
    {"2^-10+1ulp", 0x3a800001, 0x01, 0x14, 0x1400, 0x3a80},
    {"3*2^-10 (tie)", 0x3b400000, 0x02, 0x1a, 0x1a00, 0x3b40},
    {"2^-16", 0x37800000, 0x00, 0x01, 0x0100, 0x3780},
    {"2^-17 (e5m2 tie)", 0x37000000, 0x00, 0x00, 0x0080, 0x3700},
    {"2^-17+1ulp", 0x37000001, 0x00, 0x01, 0x0080, 0x3700},
    {"240", 0x43700000, 0x77, 0x5c, 0x5b80, 0x4370},
    {"432 (e4m3 tie)", 0x43d80000, 0x7e, 0x5f, 0x5ec0, 0x43d8},
    {"448", 0x43e00000, 0x7e, 0x5f, 0x5f00, 0x43e0},
    {"464 (tie)", 0x43e80000, 0x7e, 0x5f, 0x5f40, 0x43e8},
    {"464+1ulp", 0x43e80001, 0x7f, 0x5f, 0x5f40, 0x43e8},
    {"57344", 0x47600000, 0x7f, 0x7b, 0x7b00, 0x4760},
    {"61440-1ulp", 0x476fffff, 0x7f, 0x7b, 0x7b80, 0x4770},
    {"61440 (tie)", 0x47700000, 0x7f, 0x7c, 0x7b80, 0x4770},
    {"65504", 0x477fe000, 0x7f, 0x7c, 0x7bff, 0x4780},
    {"65520-1ulp", 0x477fefff, 0x7f, 0x7c, 0x7bff, 0x4780},
    {"65520 (f16 tie)", 0x477ff000, 0x7f, 0x7c, 0x7c00, 0x4780},
    {"FLT_MAX", 0x7f7fffff, 0x7f, 0x7c, 0x7c00, 0x7f80},
    {"1e-45", 0x00000001, 0x00, 0x00, 0x0000, 0x0000},
    {"2^-24", 0x33800000, 0x00, 0x00, 0x0001, 0x3380},
    {"2^-25 (f16 tie)", 0x33000000, 0x00, 0x00, 0x0000, 0x3300},
    {"2^-25+1ulp", 0x33000001, 0x00, 0x00, 0x0001, 0x3300},
    {"1.00390625 (bf16 tie)", 0x3f808000, 0x38, 0x3c, 0x3c04, 0x3f80},
    {"1.01171875 (bf16 tie)", 0x3f818000, 0x38, 0x3c, 0x3c0c, 0x3f82},
    {"+Inf", 0x7f800000, 0x7f, 0x7c, 0x7c00, 0x7f80},
    {"-Inf", 0xff800000, 0xff, 0xfc, 0xfc00, 0xff80},
};

}  // namespace

TEST_CASE("small floats: edge values encode to the codes that the reference conversions give") {
  for (auto const& edge : edges) {
    CAPTURE(edge.name);
    float const x = std::bit_cast<float>(edge.f32);
    CHECK(unsigned{f8_e4m3{x}.bits()} == edge.e4m3);
    CHECK(unsigned{f8_e5m2{x}.bits()} == edge.e5m2);
    CHECK(unsigned{f16{x}.bits()} == edge.f16);
    CHECK(unsigned{bf16{x}.bits()} == edge.bf16);
  }
}

TEST_CASE("small floats: every code decodes to its value and back, and what lies between rounds to the nearer, ties to even") {
  SUBCASE("E4M3") { check_all_codes<f8_e4m3>(e4m3); }
  SUBCASE("E5M2") { check_all_codes<f8_e5m2>(e5m2); }
  SUBCASE("E4M3FNUZ") { check_all_codes<f8_e4m3fnuz>(e4m3fnuz); }
  SUBCASE("E5M2FNUZ") { check_all_codes<f8_e5m2fnuz>(e5m2fnuz); }
  SUBCASE("F16") { check_all_codes<f16>(half); }
  SUBCASE("BF16") { check_all_codes<bf16>(brain); }
}

TEST_CASE("small floats: the largest and smallest values are those of the formats") {
  CHECK(static_cast<float>(f8_e4m3::from_bits(0x7E)) == 448.0f);
  CHECK(static_cast<float>(f8_e4m3::from_bits(0x01)) == std::ldexp(1.0f, -9));
  CHECK(static_cast<float>(f8_e5m2::from_bits(0x7B)) == 57344.0f);
  CHECK(static_cast<float>(f8_e5m2::from_bits(0x01)) == std::ldexp(1.0f, -16));
  CHECK(static_cast<float>(f8_e4m3fnuz::from_bits(0x7F)) == 240.0f);
  CHECK(static_cast<float>(f8_e4m3fnuz::from_bits(0x01)) == std::ldexp(1.0f, -10));
  CHECK(static_cast<float>(f8_e5m2fnuz::from_bits(0x7F)) == 57344.0f);
  CHECK(static_cast<float>(f8_e5m2fnuz::from_bits(0x01)) == std::ldexp(1.0f, -17));
  CHECK(static_cast<float>(f16::from_bits(0x0001)) == std::ldexp(1.0f, -24));
  CHECK(static_cast<float>(bf16::from_bits(0x0001)) == std::ldexp(1.0f, -133));
}

TEST_CASE("FNUZ floats have no minus zero: it becomes zero, and its code is the only NaN") {
  CHECK(f8_e4m3fnuz{-0.0f}.bits() == 0);
  CHECK(f8_e5m2fnuz{-0.0f}.bits() == 0);
  CHECK(f8_e4m3fnuz{-1e-30f}.bits() == 0);
  CHECK(f8_e4m3fnuz{1e30f}.bits() == 0x80);
  CHECK(f8_e4m3fnuz{-std::numeric_limits<float>::quiet_NaN()}.bits() == 0x80);
}

TEST_CASE("E8M0: every code is a power of two, and 255 is NaN") {
  for (unsigned code = 0; code < 255; ++code) CHECK(static_cast<float>(f8_e8m0::from_bits(static_cast<std::uint8_t>(code))) == std::ldexp(1.0f, static_cast<int>(code) - 127));
  CHECK(std::isnan(static_cast<float>(f8_e8m0::from_bits(255))));
}

TEST_CASE("small floats compare as the floats they stand for") {
  CHECK(bf16{0.0f} == bf16{-0.0f});
  CHECK_FALSE(bf16{std::numeric_limits<float>::quiet_NaN()} == bf16{std::numeric_limits<float>::quiet_NaN()});
}

TEST_CASE("dtypes: 24 names, each found again, none in another case") {
  std::set<std::string_view> names;
  for (int i = 0; i < dtype_count; ++i) {
    auto const dtype = static_cast<DType>(i);
    DType found{};
    CHECK(parse_dtype(to_string(dtype), found));
    CHECK(found == dtype);
    CHECK(bits_of(dtype) > 0);
    names.insert(to_string(dtype));
  }
  CHECK(names.size() == 24);
  DType dtype = DType::f64;
  for (auto const* name : {"", "f32", "F32 ", "F128", "BF16X", "bool", "F8"}) CHECK_FALSE(parse_dtype(name, dtype));
  CHECK(dtype == DType::f64);
  std::ostringstream out;
  out << DType::f8_e4m3;
  CHECK(out.str() == "F8_E4M3");
}

TEST_CASE("dtypes: sizes are those of the C++ types that stand for them") {
  CHECK(bits_of(dtype_of<bool>) == 8 * sizeof(bool));
  CHECK(bits_of(dtype_of<bf16>) == 8 * sizeof(bf16));
  CHECK(bits_of(dtype_of<f16>) == 8 * sizeof(f16));
  CHECK(bits_of(dtype_of<f8_e8m0>) == 8 * sizeof(f8_e8m0));
  CHECK(bits_of(dtype_of<std::int16_t>) == 16);
  CHECK(bits_of(dtype_of<std::uint32_t>) == 32);
  CHECK(bits_of(dtype_of<double>) == 64);
  CHECK(bits_of(dtype_of<std::complex<float>>) == 8 * sizeof(std::complex<float>));
  CHECK(bits_of(dtype_of<f4>) == 4);
  CHECK(bits_of(dtype_of<f6_e2m3>) == 6);
  CHECK(bits_of(dtype_of<f6_e3m2>) == 6);
}

// SPDX-License-Identifier: Apache-2.0
// What PyTorch puts into archives, as values of C++ and back: tensors, plain Python objects, and what of them JSON has no word for.
#include <dcp/formats/torch_objects.hpp>

#include "formats/golden.hpp"
#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/outcome.hpp"
#include "support/python_values.hpp"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

using dcp::DType;
using dcp::Value;
using dcp::ValueKind;
using Json = nlohmann::json;
using V = dcp::test::PythonValue;

namespace {

using Records = std::map<std::string, dcp::Bytes>;

Value value_of(dcp::Bytes const& pickle, Records const& records = {}, dcp::torch::ObjectOptions const& options = {}) {
  dcp::pickle::ParseOptions parse;
  parse.opaque = options.opaque;
  auto const tree = dcp::pickle::Tree::parse(pickle, dcp::torch::is_known_global<>, parse);
  return dcp::torch::to_value(
      tree.root(),
      [&](std::string_view key) -> dcp::ConstByteSpan {
        auto const at = records.find(std::string{key});
        if (at == records.end()) throw dcp::Error{dcp::ErrorCode::missing_tensor, "no storage"};
        return at->second;
      },
      options);
}
Value value_of(V const& object, Records const& records = {}, dcp::torch::ObjectOptions const& options = {}) { return value_of(object.pickled(), records, options); }

Value json_value(std::string const& text) { return dcp::detail::make_value(ValueKind::json, DType::u8, dcp::as_byte_span(text)); }
// A value out of its pickle.
Value there_and_back(Value const& value) {
  std::vector<dcp::torch::ObjectRecord> records;
  dcp::Bytes const pickle = dcp::torch::write_object(value, records);
  Records stored;
  for (auto const& record : records) stored[record.key] = record.bytes;
  return value_of(pickle, stored);
}
std::string shown(Value const& value) { return std::string{to_string(value.kind)} + ' ' + std::string{to_string(value.dtype)} + ' ' + to_json(value); }

dcp::Bytes bytes_of(std::vector<int> const& list) {
  dcp::Bytes bytes;
  for (int const one : list) bytes.push_back(static_cast<std::byte>(one));
  return bytes;
}

// ---- random documents

double any_real(dcp::test::Random& random) { return random.any_of(std::vector<double>{0.0, -0.0, 1.0, 1.5, -2.25, 0.1, 1e300, 5e-324, -1e-7, 9007199254740993.0}); }
std::string any_text(dcp::test::Random& random) { return random.any_of(std::vector<std::string>{"", "a", "layer.0.weight", "\u00fc\"\\\n", "\u65e5\u672c \U0001F680", std::string(300, 'x'), "__types__"}); }
std::string any_hex(dcp::test::Random& random) { return dcp::hex_text(random.bytes(static_cast<std::size_t>(random.between(0, 40)))); }

Json any_document(dcp::test::Random& random, int depth);
Json any_items(dcp::test::Random& random, int depth) {
  Json items = Json::array();
  for (auto count = random.between(0, 4); count > 0; --count) items.push_back(any_document(random, depth + 1));
  return items;
}
Json any_tensor(dcp::test::Random& random) {
  DType dtype{};
  do dtype = static_cast<DType>(random.between(0, dcp::dtype_count - 1));
  while (dcp::torch::dtype_name(dtype).empty());
  dcp::Extents shape = dcp::test::any_shape(random, 3, 30);
  if (dtype == DType::f4) {
    if (shape.rank() == 0) shape = dcp::Extents{1};
    shape[shape.rank() - 1] *= 2;
  }
  Json sizes = Json::array();
  for (auto const size : shape) sizes.push_back(size);
  auto const bytes = random.bytes(static_cast<std::size_t>(shape.elements()) * static_cast<std::size_t>(dcp::bits_of(dtype)) / 8);
  return {{"__type__", "tensor"}, {"dtype", std::string{to_string(dtype)}}, {"shape", sizes}, {"hex", dcp::hex_text(bytes)}};
}
Json any_document(dcp::test::Random& random, int depth) {
  auto const kind = random.between(0, depth > 4 ? 12 : 18);
  switch (kind) {
    case 0: return nullptr;
    case 1: return random.one_in(2);
    case 2: return random.any_of(std::vector<std::int64_t>{0, 1, -1, 255, 256, -129, 65535, 65536, std::int64_t{1} << 31, -(std::int64_t{1} << 31), std::int64_t{1} << 53, -(std::int64_t{1} << 53), (std::int64_t{1} << 40) - 1});
    case 3: return any_real(random);
    case 4: return any_text(random);
    case 5: return {{"__type__", random.one_in(2) ? "bytes" : "bytearray"}, {"hex", any_hex(random)}};
    case 6: return {{"__type__", "float"}, {"repr", random.any_of(std::vector<std::string>{"nan", "inf", "-inf"})}};
    case 7: return {{"__type__", "int"}, {"decimal", random.any_of(std::vector<std::string>{"9007199254740993", "-9007199254740993", "9223372036854775807", "-9223372036854775808", "9223372036854775808", "18446744073709551615", "18446744073709551616", "-9223372036854775809",
                                                                                            "1208925819614629174706179", "-170141183460469231731687303715884105728", "340282366920938463463374607431768211456", "1" + std::string(200, '0')})}};
    case 8: return {{"__type__", "complex"}, {"re", any_real(random)}, {"im", random.one_in(3) ? Json("inf") : random.one_in(2) ? Json("nan") : Json(any_real(random))}};
    case 9: return {{"__type__", "torch.dtype"}, {"name", random.any_of(std::vector<std::string>{"float32", "bfloat16", "complex32", "float4_e2m1fn_x2", "bool"})}};
    case 10: return {{"__type__", "torch.device"}, {"name", random.any_of(std::vector<std::string>{"cpu", "cuda:3", "meta"})}};
    case 11: return any_tensor(random);
    case 12: return {{"__type__", "io.BytesIO"}, {"hex", any_hex(random)}, {"pos", random.between(0, 1000)}};
    case 13: return {{"__type__", random.any_of(std::vector<std::string>{"tuple", "set", "frozenset", "torch.Size"})}, {"items", any_items(random, depth)}};
    case 14: {
      // A dict with keys that are no text, or that would be taken for a type.
      Json pairs = Json::array();
      for (auto count = random.between(1, 3); count > 0; --count) pairs.push_back({random.between(-5, 500), any_document(random, depth + 1)});
      if (random.one_in(3)) pairs.push_back({"__type__", any_document(random, depth + 1)});
      return {{"__type__", "dict"}, {"items", pairs}};
    }
    case 15: return any_items(random, depth);
    default: break;
  }
  Json object = Json::object();
  for (auto count = random.between(0, 4); count > 0; --count) object[any_text(random) + std::to_string(count)] = any_document(random, depth + 1);
  return object;
}

V tensor_of(std::string const& storage_class, std::int64_t count, std::vector<std::int64_t> const& shape, std::vector<std::int64_t> const& strides, std::int64_t first = 0) {
  auto const numbers = [](std::vector<std::int64_t> const& list) {
    V tuple = V::tuple();
    for (auto const one : list) tuple.parts.push_back(V::number(one));
    return tuple;
  };
  return V::call("torch._utils", "_rebuild_tensor_v2",
                 {V::persistent(V::tuple({V::of_text("storage"), V::global("torch", storage_class), V::of_text("0"), V::of_text("cpu"), V::number(count)})), V::number(first), numbers(shape), numbers(strides), V::boolean(false), V::call("collections", "OrderedDict")});
}

}  // namespace

TEST_CASE("names of dtypes: every dtype but those of six bits has one in torch, no two the same, and it leads back") {
  std::set<std::string_view> names;
  for (int i = 0; i < dcp::dtype_count; ++i) {
    auto const dtype = static_cast<DType>(i);
    CAPTURE(dtype);
    auto const name = dcp::torch::dtype_name(dtype);
    CHECK(name.empty() == (dtype == DType::f6_e2m3 || dtype == DType::f6_e3m2));
    if (name.empty()) continue;
    CHECK(names.insert(name).second);
    DType back{};
    CHECK(dcp::torch::dtype_called(name, back));
    CHECK(back == dtype);
  }
  CHECK(names.size() == 22);
  DType untouched = DType::i8;
  for (std::string_view const none : {"", "Float32", "float", "qint8", "float6_e2m3fn", "float32 ", "int4"}) {
    CHECK(!dcp::torch::dtype_called(none, untouched));
    CHECK(untouched == DType::i8);
  }
  CHECK(dcp::torch::dtype_name(DType::f8_e4m3) == "float8_e4m3fn");
  CHECK(dcp::torch::dtype_name(DType::f4) == "float4_e2m1fn_x2");
  CHECK(dcp::torch::dtype_name(DType::c128) == "complex128");
}

TEST_CASE("shapes of F4: torch counts pairs in the last dimension, and what has no pairs is refused; all others are as they are") {
  using dcp::Extents;
  CHECK(dcp::torch::shape_from_torch(DType::f4, Extents{3, 4}) == Extents{3, 8});
  CHECK(dcp::torch::shape_to_torch(DType::f4, Extents{3, 8}) == Extents{3, 4});
  CHECK(dcp::torch::shape_to_torch(DType::f4, Extents{3, 0}) == Extents{3, 0});
  CHECK(dcp::torch::shape_from_torch(DType::f32, Extents{3, 5}) == Extents{3, 5});
  CHECK(dcp::torch::shape_to_torch(DType::u8, Extents{}) == Extents{});
  CHECK(golden::outcome([] { dcp::torch::shape_from_torch(DType::f4, Extents{}); }) == "unsupported");
  CHECK(golden::outcome([] { dcp::torch::shape_from_torch(DType::f4, Extents{INT64_MAX}); }) == "unsupported");
  CHECK(golden::outcome([] { dcp::torch::shape_to_torch(DType::f4, Extents{3, 5}); }) == "unsupported");
  CHECK(golden::outcome([] { dcp::torch::shape_to_torch(DType::f4, Extents{}); }) == "unsupported");
}

TEST_CASE("law: the pickle of a tensor says dtype, shape, strides and size of the storage of any tensor that torch can have") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(2000, 50'000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    dcp::test::Random random{seed};
    auto const dtype = static_cast<DType>(random.between(0, dcp::dtype_count - 1));
    dcp::Extents const shape = dcp::test::any_shape(random, 5, 1000);
    dcp::pickle::Writer out;
    if (dcp::torch::dtype_name(dtype).empty()) {
      CHECK(golden::outcome([&] { dcp::torch::write_tensor(out, dtype, shape); }) == "unsupported_dtype");
      continue;
    }
    dcp::torch::write_tensor(out, dtype, shape, "7");
    dcp::Bytes const pickle = out.take();
    auto const tree = dcp::pickle::Tree::parse(pickle, dcp::torch::is_known_global<>);
    auto const tensor = dcp::torch::parse_tensor(tree.root());
    CHECK(tensor.key == "7");
    CHECK(tensor.dtype == dtype);
    CHECK(tensor.shape == shape);
    CHECK(tensor.first == 0);
    CHECK(tensor.storage_bytes == static_cast<std::uint64_t>(shape.elements()) * dcp::torch::element_bytes(tensor.dtype));
    CHECK(dcp::torch::element_bytes(tensor.dtype) * 8 == (dtype == DType::f4 ? 8u : static_cast<unsigned>(dcp::bits_of(dtype))));
    auto const strides = dcp::row_major_strides(shape);
    REQUIRE(tensor.strides.size() == static_cast<std::size_t>(shape.rank()));
    for (int d = 0; d < shape.rank(); ++d) CHECK(tensor.strides[static_cast<std::size_t>(d)] == static_cast<std::uint64_t>(strides[d]));
    CHECK(!tensor.conjugate);
    CHECK(!tensor.negative);
  }
}

TEST_CASE("law: any JSON of these conventions becomes Python objects and the same JSON again") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  std::size_t characters = 0;
  for (int round = 0; round < dcp::test::rounds(3000, 100'000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    dcp::test::Random random{seed};
    Json const document{{"x", any_document(random, 0)}};   // a dict is always JSON
    std::string const text = document.dump();
    Value const back = there_and_back(json_value(text));
    CHECK(back.kind == ValueKind::json);
    REQUIRE(Json::parse(dcp::as_text(back.payload)).dump() == text);
    characters += text.size();
  }
  CHECK(characters > 30'000);
}

TEST_CASE("law: numbers, arrays, text and bytes of C++ come back with the widths of Python: 64-bit integers and doubles") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  std::vector<DType> const dtypes{DType::boolean, DType::i8, DType::u8, DType::i16, DType::u16, DType::i32, DType::u32, DType::i64, DType::f32, DType::f64};
  for (int round = 0; round < dcp::test::rounds(2000, 50'000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    dcp::test::Random random{seed};
    DType const dtype = random.any_of(dtypes);
    bool const real = dtype == DType::f32 || dtype == DType::f64, array = random.one_in(2);
    std::size_t const size = static_cast<std::size_t>(dcp::bits_of(dtype)) / 8, count = array ? static_cast<std::size_t>(random.between(1, 9)) : 1;
    Value value{array ? ValueKind::array : ValueKind::number, dtype, {}, {}};
    std::vector<double> reals;
    std::vector<std::int64_t> integers;
    for (std::size_t i = 0; i < count; ++i) {
      dcp::Bytes one = random.bytes(size);
      if (dtype == DType::boolean) one[0] &= std::byte{1};
      if (real && (one[size - 1] & std::byte{0x7F}) == std::byte{0x7F}) one[size - 1] = std::byte{0};   // NaNs have bits of their own
      value.payload.insert(value.payload.end(), one.begin(), one.end());
      if (dtype == DType::boolean) integers.push_back(one[0] == std::byte{1} ? 1 : 0);
      else
        dcp::detail::with_number_type(dtype, [&](auto type) {
          using T = decltype(type);
          if constexpr (!std::is_same_v<T, bool>) real ? reals.push_back(static_cast<double>(dcp::load_little_endian<T>(one.data()))) : integers.push_back(static_cast<std::int64_t>(dcp::load_little_endian<T>(one.data())));
        });
    }
    Value const back = there_and_back(value);
    CHECK(back.kind == value.kind);
    CHECK(back.dtype == (real ? DType::f64 : dtype == DType::boolean ? DType::boolean : DType::i64));
    dcp::Bytes wanted;
    if (dtype == DType::boolean) for (auto const x : integers) wanted.push_back(static_cast<std::byte>(x));
    else if (real) dcp::detail::append(wanted, std::as_bytes(std::span{reals}));
    else dcp::detail::append(wanted, std::as_bytes(std::span{integers}));
    REQUIRE((back.payload == wanted));
  }
  auto const plain = [](ValueKind kind, dcp::Bytes const& payload) { return dcp::detail::make_value(kind, DType::u8, payload); };
  dcp::Bytes all;
  for (int i = 0; i < 256; ++i) all.push_back(static_cast<std::byte>(i));
  CHECK(there_and_back(plain(ValueKind::bytes, all)) == plain(ValueKind::bytes, all));
  CHECK(there_and_back(plain(ValueKind::bytes, {})) == plain(ValueKind::bytes, {}));
  std::string const text = "\u00fc\n\u65e5";
  auto const as_text = plain(ValueKind::text, {dcp::as_byte_span(text).begin(), dcp::as_byte_span(text).end()});
  CHECK(there_and_back(as_text) == as_text);
  CHECK(shown(there_and_back({ValueKind::array, DType::f32, {}, {}})) == "json U8 []");
  double const nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(dcp::load_little_endian<double>(there_and_back(dcp::detail::make_value(ValueKind::number, DType::f64, std::as_bytes(std::span{&nan, 1}))).payload.data())));
  std::uint64_t const most = std::numeric_limits<std::uint64_t>::max();
  CHECK(shown(there_and_back(dcp::detail::make_value(ValueKind::number, DType::u64, std::as_bytes(std::span{&most, 1})))) == R"(json U8 {"__type__":"int","decimal":"18446744073709551615"})");
  CHECK(shown(there_and_back({ValueKind::per_rank, DType::u8, {}, {as_text, as_text}})) == "json U8 [" + dcp::json_quoted(text) + "," + dcp::json_quoted(text) + "]");
}

TEST_CASE("objects of Python become the most specific value") {
  std::vector<std::pair<V, std::string>> const cases{
      {V::none(), "json U8 null"},
      {V::boolean(true), "number BOOL true"},
      {V::number(-3), "number I64 -3"},
      {V::number(INT64_MIN), "number I64 -9223372036854775808"},
      {V::of_real(0.1), "number F64 0.1"},
      {V::of_text("a\n"), "text U8 \"a\\n\""},
      {V::list(), "json U8 []"},
      {V::list({V::number(1), V::number(2)}), "array I64 [1,2]"},
      {V::list({V::of_real(1), V::of_real(2)}), "array F64 [1.0,2.0]"},
      {V::list({V::boolean(true)}), "array BOOL [true]"},
      {V::list({V::number(1), V::of_real(2)}), "json U8 [1,2.0]"},
      {V::list({V::number(1), V::boolean(true)}), "json U8 [1,true]"},
      {V::list({V::list({V::number(1)})}), "json U8 [[1]]"},
      {V::list({V::number((std::int64_t{1} << 53) + 1), V::none()}), R"(json U8 [{"__type__":"int","decimal":"9007199254740993"},null])"},
      {V::tuple(), R"(json U8 {"__type__":"tuple","items":[]})"},
      {V::tuple({V::number(1), V::of_text("x")}), R"(json U8 {"__type__":"tuple","items":[1,"x"]})"},
      {V::dict({{"a", V::number(1)}, {"b", V::dict()}}), R"(json U8 {"a":1,"b":{}})"},
      {V::dict({{"__type__", V::number(1)}}), R"(json U8 {"__type__":"dict","items":[["__type__",1]]})"},
      {V{.kind = V::Kind::dict, .parts = {V::number(3), V::none(), V::tuple({V::number(1)}), V::none()}}, R"(json U8 {"__type__":"dict","items":[[3,null],[{"__type__":"tuple","items":[1]},null]]})"},
      {V::call("collections", "OrderedDict"), "json U8 {}"},
      {V::call("_codecs", "encode", {V::of_text("a\u00ff"), V::of_text("latin1")}), "bytes U8 \"61ff\""},
      {V::call("__builtin__", "bytes"), "bytes U8 \"\""},
      {V::call("builtins", "bytearray", {V::call("_codecs", "encode", {V::of_text("\u0080"), V::of_text("latin1")})}), R"(json U8 {"__type__":"bytearray","hex":"80"})"},
      {V::call("__builtin__", "bytearray"), R"(json U8 {"__type__":"bytearray","hex":""})"},
      {V::call("__builtin__", "set", {V::list({V::number(1)})}), R"(json U8 {"__type__":"set","items":[1]})"},
      {V::call("builtins", "frozenset"), R"(json U8 {"__type__":"frozenset","items":[]})"},
      {V::call("__builtin__", "complex", {V::of_real(1.5), V::of_real(-std::numeric_limits<double>::infinity())}), R"(json U8 {"__type__":"complex","re":1.5,"im":"-inf"})"},
      {V::list({V::of_real(std::numeric_limits<double>::infinity()), V::none()}), R"(json U8 [{"__type__":"float","repr":"inf"},null])"},
      {V::global("torch", "bfloat16"), R"(json U8 {"__type__":"torch.dtype","name":"bfloat16"})"},
      {V::call("torch", "device", {V::of_text("cuda:1")}), R"(json U8 {"__type__":"torch.device","name":"cuda:1"})"},
      {V::call("torch", "Size", {V::tuple({V::number(2)})}), R"(json U8 {"__type__":"torch.Size","items":[2]})"},
      {V::call("pathlib", "PosixPath", {V::of_text("/"), V::of_text("tmp"), V::of_text("ckpt")}), R"(json U8 {"__type__":"pathlib.PosixPath","name":"/tmp/ckpt"})"},
      {V::made("_io", "BytesIO", {V::tuple({V::call("_codecs", "encode", {V::of_text("ab"), V::of_text("latin1")}), V::number(1), V::none()})}), "bytes U8 \"6162\""},
      {V::list({V::made("_io", "BytesIO", {V::tuple({V::call("_codecs", "encode", {V::of_text("ab"), V::of_text("latin1")}), V::number(1), V::none()})})}), R"(json U8 [{"__type__":"io.BytesIO","hex":"6162","pos":1}])"},
  };
  for (auto const& [object, wanted] : cases) {
    auto const& said = wanted;   // older clang++ does not capture bindings
    CAPTURE(said);
    CHECK(shown(value_of(object)) == wanted);
  }
}

TEST_CASE("a tensor inside an object is its elements in row-major order, whatever its strides are") {
  Records const records{{"0", bytes_of({0, 1, 2, 3, 4, 5, 6, 7})}};
  CHECK(shown(value_of(tensor_of("ByteStorage", 8, {2, 3}, {3, 1}, 1), records)) == R"(json U8 {"__type__":"tensor","dtype":"U8","shape":[2,3],"hex":"010203040506"})");
  CHECK(shown(value_of(tensor_of("ByteStorage", 8, {3, 2}, {1, 3}), records)) == R"(json U8 {"__type__":"tensor","dtype":"U8","shape":[3,2],"hex":"000301040205"})");
  CHECK(shown(value_of(tensor_of("ShortStorage", 4, {2}, {2}), records)) == R"(json U8 {"__type__":"tensor","dtype":"I16","shape":[2],"hex":"00010405"})");
  CHECK(shown(value_of(tensor_of("ByteStorage", 8, {}, {}, 7), records)) == R"(json U8 {"__type__":"tensor","dtype":"U8","shape":[],"hex":"07"})");
  CHECK(shown(value_of(tensor_of("ByteStorage", 8, {0, 4}, {4, 1}), records)) == R"(json U8 {"__type__":"tensor","dtype":"U8","shape":[0,4],"hex":""})");
  CHECK(golden::outcome([&] { value_of(tensor_of("ByteStorage", 9, {9}, {1}), records); }) == "size_mismatch");
  CHECK(golden::outcome([&] { value_of(tensor_of("ByteStorage", 8, {9}, {1}), records); }) == "size_mismatch");
  CHECK(golden::outcome([&] { value_of(tensor_of("ByteStorage", 8, {8}, {1})); }) == "missing_tensor");
  // One byte of storage can be any number of elements.
  CHECK(golden::outcome([&] { value_of(tensor_of("ByteStorage", 8, {std::int64_t{1} << 40, std::int64_t{1} << 20}, {0, 0}), records); }) == "limit");
}

TEST_CASE("limits: an object of more parts, levels or characters than are allowed is refused, one of as many is not") {
  auto const with = [](dcp::torch::ObjectOptions const& options, V const& object) { return golden::outcome([&] { value_of(object, {}, options); }); };
  V deep = V::none();
  for (int i = 0; i < 20; ++i) deep = V::list({deep});
  CHECK(with({.max_depth = 20}, deep) == "ok");
  CHECK(with({.max_depth = 19}, deep) == "limit");
  V const wide = V::list(std::vector<V>(50, V::none()));
  CHECK(with({.max_nodes = 51}, wide) == "ok");
  CHECK(with({.max_nodes = 50}, wide) == "limit");
  CHECK(with({.max_text_bytes = 300}, wide) == "ok");
  CHECK(with({.max_text_bytes = 200}, wide) == "limit");
}

TEST_CASE("classes that are unknown are refused, and the message names them; with the option they are listed") {
  V const thing = V::call("my.module", "Thing", {V::number(1)});
  auto const error = dcp::test::error_of([&] { value_of(thing); });
  REQUIRE(error.has_value());
  CHECK(error->code() == dcp::ErrorCode::unsupported);
  CHECK(std::string{error->what()}.find("Thing") != std::string::npos);
  CHECK(std::string{error->what()}.find("my.module") != std::string::npos);
  CHECK(shown(value_of(thing, {}, {.opaque = true})) == R"(json U8 {"__type__":"opaque","class":"my.module.Thing"})");
  CHECK(shown(value_of(V::list({V::number(1), V::global("os", "system")}), {}, {.opaque = true})) == R"(json U8 [1,{"__type__":"opaque","class":"os.system"}])");
  // What is known but has no meaning as an object.
  for (V const& odd : {V::call("torch.serialization", "_get_layout", {V::of_text("torch.strided")}), V::global("torch", "FloatStorage"), V::global("collections", "OrderedDict"), V::call("__builtin__", "list")}) {
    auto const refused = dcp::test::error_of([&] { value_of(odd); });
    REQUIRE(refused.has_value());
    CHECK(refused->code() == dcp::ErrorCode::unsupported);
    CHECK(std::string{refused->what()}.find(odd.text + "." + odd.name) != std::string::npos);
  }
}

TEST_CASE("objects of an impossible form are refused") {
  auto const code = [](V const& object) { return golden::outcome([&] { value_of(object); }); };
  CHECK(code(V::call("_codecs", "encode", {V::of_text("\u0100"), V::of_text("latin1")})) == "bad_schema");
  CHECK(code(V::call("_codecs", "encode", {V::of_text("a"), V::of_text("rot13")})) == "bad_schema");
  CHECK(code(V::call("_codecs", "encode", {V::of_text("a")})) == "bad_schema");
  CHECK(code(V::call("_codecs", "encode", {V::number(1), V::of_text("latin1")})) == "bad_schema");
  CHECK(code(V::call("__builtin__", "bytes", {V::number(1 << 30)})) == "bad_schema");   // in Python, as many zeros
  CHECK(code(V::call("__builtin__", "complex", {V::of_real(1)})) == "bad_schema");
  CHECK(code(V::call("__builtin__", "complex", {V::number(1), V::number(2)})) == "bad_schema");
  CHECK(code(V::call("torch", "device", {V::number(1)})) == "bad_schema");
  CHECK(code(V::call("torch", "device")) == "bad_schema");
  CHECK(code(V::call("torch", "Size")) == "bad_schema");
  CHECK(code(V::call("torch", "Size", {V::number(1)})) == "bad_schema");
  CHECK(code(V::call("__builtin__", "set", {V::number(1)})) == "bad_schema");
  CHECK(code(V::made("_io", "BytesIO", {V::number(1)})) == "bad_schema");
  CHECK(code(V::persistent(V::tuple({V::of_text("storage")}))) == "bad_schema");
}

TEST_CASE("write_object: JSON with a type that cannot be written, or that is not formed as its type, is refused and the message says what it is") {
  std::vector<std::array<std::string, 3>> const cases{
      {R"({"__type__":"opaque","class":"x.Y"})", "unsupported", "opaque"},
      {R"([1,{"__type__":"numpy.ndarray"}])", "unsupported", "numpy.ndarray"},
      {R"({"__type__":"torch.dtype","name":"float7"})", "bad_schema", "float7"},
      {R"({"__type__":"tensor","dtype":"F6_E2M3","shape":[4],"hex":"000000"})", "unsupported_dtype", "F6_E2M3"},
      {R"({"__type__":"tensor","dtype":"F99","shape":[4],"hex":"000000"})", "bad_schema", "F99"},
      {R"({"__type__":"tensor","dtype":"F32","shape":[2],"hex":"00000000"})", "bad_schema", "4 bytes"},
      {R"({"__type__":"tensor","dtype":"F4","shape":[3],"hex":"00"})", "bad_schema", ""},
      {R"({"__type__":"bytes","hex":"0"})", "bad_schema", "hexadecimal"},
      {R"({"__type__":"bytes","hex":"0G"})", "bad_schema", "hexadecimal"},
      {R"({"__type__":"float","repr":"infinity"})", "bad_schema", "infinity"},
      {R"({"__type__":"int","decimal":"12a"})", "bad_schema", "12a"},
      {R"({"__type__":"int","decimal":""})", "bad_schema", ""},
      {R"({"__type__":"int","decimal":"-"})", "bad_schema", ""},
  };
  for (auto const& [text, code, said] : cases) {
    auto const& shown_text = text;   // older clang++ does not capture bindings
    CAPTURE(shown_text);
    std::vector<dcp::torch::ObjectRecord> records;
    auto const value = json_value(text);
    auto const error = dcp::test::error_of([&] { dcp::torch::write_object(value, records); });
    REQUIRE(error.has_value());
    CHECK(to_string(error->code()) == code);
    CHECK(std::string{error->what()}.find(said) != std::string::npos);
  }
  // A path becomes text, which every unpickler of PyTorch's loads.
  CHECK(shown(there_and_back(json_value(R"({"__type__":"pathlib.PosixPath","name":"/tmp/x"})"))) == "text U8 \"/tmp/x\"");
  // A member of this name that is no text is a member.
  CHECK(shown(there_and_back(json_value(R"({"__type__":1})"))) == R"(json U8 {"__type__":"dict","items":[["__type__",1]]})");
}

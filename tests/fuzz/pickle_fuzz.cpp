// SPDX-License-Identifier: Apache-2.0
// seconds: 60
// libFuzzer target: any bytes as a pickle. Whatever is accepted has no more nodes than its bytes allow, and can be walked within the
// bounds that expanded_nodes gives.
// fuzz: -max_len=4096

#include <dcp/formats/pickle.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>

namespace {

using dcp::pickle::Kind;
using dcp::pickle::Value;

void expect(bool condition) {
  if (!condition) std::abort();
}

std::uint64_t walk(Value const& value) {
  std::uint64_t met = 1;
  auto const part = [&](Value const& p) { met += walk(p); };
  auto const pair = [&](Value const& k, Value const& v) { part(k), part(v); };
  switch (value.kind()) {
    case Kind::text: expect(dcp::first_invalid_utf8(value.text()) == std::string_view::npos); break;
    case Kind::bytes: expect(value.bytes().size() < SIZE_MAX); break;
    case Kind::large_integer: expect(value.bytes().size() > 8); break;
    case Kind::list:
    case Kind::tuple:
      for (std::size_t i = 0; i < value.size() && i < 8; ++i) value.item(i).kind();
      [[fallthrough]];
    case Kind::set: value.for_each(part); break;
    case Kind::dict: value.for_each_pair(pair), value.find("a"); break;
    case Kind::global: met += 2, expect(value.module().size() + value.name().size() < SIZE_MAX); break;
    case Kind::persistent: part(value.persistent_id()); break;
    case Kind::object:
      met += 3, expect(value.is_call_of(value.module(), value.name()));
      part(value.arguments());
      if (auto const keywords = value.keywords()) part(*keywords);
      if (auto const state = value.state()) part(*state);
      try {
        value.for_each_pair(pair);
      } catch (dcp::Error const&) {
        value.for_each(part);
      }
      break;
    default: break;
  }
  return met;
}

void read(dcp::ConstByteSpan bytes, dcp::pickle::ParseOptions const& options) try {
  std::size_t consumed = 0;
  auto const tree = dcp::pickle::Tree::parse(bytes, [](std::string_view module, std::string_view name) { return module != "os" && name != "eval"; }, options, &consumed);
  expect(consumed <= bytes.size() && (options.allow_trailing_bytes || consumed == bytes.size()));
  expect(tree.root().id() < bytes.size() + 4);
  std::uint64_t const limit = 100'000, counted = dcp::pickle::expanded_nodes(tree.root(), limit);
  expect(counted <= limit && walk(tree.root()) == counted);
} catch (dcp::Error const&) {
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  dcp::ConstByteSpan const bytes = std::as_bytes(std::span{data, size});
  read(bytes, {});
  read(bytes, {.limits = {.max_nodes = 200, .max_depth = 4, .max_memo = 50}, .allow_trailing_bytes = true, .opaque = true});
  return 0;
}

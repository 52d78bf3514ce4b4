// SPDX-License-Identifier: Apache-2.0
#pragma once
// The schemes of Quantized<...> as objects, so that a body which is to run with each of them is compiled once.

#include <dcp/dcp.hpp>

#include <string>
#include <utility>
#include <vector>

namespace dcp::test {

/// What bodies do with a scheme.
struct Scheme {
  std::string name;
  Report (*load)(ThreadComm&, std::string const&, StateDict const&, LoadOptions<detail::no_options> const&);
  OwnedState (*owned)(SelfComm&, std::string const&, std::vector<std::string> const&);
  Contents (*contents)(SelfComm&, std::string const&);
};
template <class S>
Scheme scheme(std::string name) {
  using Storage = Quantized<S, SafeTensors>;
  return {std::move(name),
          [](ThreadComm& world, std::string const& place, StateDict const& state, LoadOptions<detail::no_options> const& o) {
            return dcp::load<Storage>(world, place, state, {.on_unexpected = o.on_unexpected, .on_dtype = o.on_dtype, .verify = o.verify, .read_once = o.read_once, .memory_bytes = o.memory_bytes, .threads = o.threads});
          },
          [](SelfComm& self, std::string const& place, std::vector<std::string> const& keys) { return dcp::load_from_keys<Storage>(self, place, keys); },
          [](SelfComm& self, std::string const& place) { return dcp::contents<Storage>(self, place); }};
}
inline Scheme const& any_scheme() {
  static Scheme const any = scheme<AnyScheme>("any");
  return any;
}
inline Scheme const& scheme_called(std::string const& name) {
  static std::vector<Scheme> const list{scheme<Fp8Block<128>>("fp8_block"), scheme<Fp8Tensor>("fp8_tensor"), scheme<Fp8Channel>("fp8_channel"), scheme<Mxfp8>("mxfp8"),
                                        scheme<Mxfp4>("mxfp4"), scheme<Nvfp4>("nvfp4"), scheme<Int8Channel>("int8_channel"), scheme<Int8Group>("int8_group"),
                                        scheme<Int4Packed>("int4_packed"), scheme<Gptq>("gptq"), scheme<Awq>("awq"), scheme<Nf4>("nf4"), scheme<Fp8Block<4, 6>>("fp8_block 4x6")};
  for (auto const& one : list)
    if (one.name == name) return one;
  return any_scheme();
}

}  // namespace dcp::test

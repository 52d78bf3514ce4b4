// SPDX-License-Identifier: Apache-2.0
#pragma once
// nlohmann::json documents as values of a state.

#include <dcp/base/config.hpp>
#include <dcp/core/state_dict.hpp>

#include <nlohmann/json.hpp>

#include <cmath>
#include <string>

namespace dcp {

/// A JSON document is stored as one value, with the library's own spelling of it. Throws Error(invalid_argument) when saving a
/// number that JSON cannot say (infinity, NaN), and Error(bad_utf8) for strings that are not UTF-8.
template <>
struct EntryOf<nlohmann::json> {
  static constexpr bool is_view = false;
  template <class = Deferred>
  static void add(StateDict& state, std::string const& name, nlohmann::json& object) {
    static constexpr ValueOps ops{ValueKind::json, DType::u8, [](void const* json) { return encode(*static_cast<nlohmann::json const*>(json)); },
                                  [](void* json, Value const& value) { *static_cast<nlohmann::json*>(json) = nlohmann::json::parse(as_text(value.payload)); }};
    state.add_value(name, {&object, &ops, false, RankPolicy::fail});
  }

 private:
  static void check(nlohmann::json const& json) {
    if (json.is_number_float() && !std::isfinite(*json.get_ptr<double const*>())) throw Error{ErrorCode::invalid_argument, "a JSON value holds a number that JSON cannot say (infinity or NaN)"};
    if (json.is_structured())
      for (auto const& item : json) check(item);
  }
  template <class = Deferred>
  static Value encode(nlohmann::json const& json) {
    check(json);
    try {
      return detail::make_value(ValueKind::json, DType::u8, as_byte_span(json.dump()));
    } catch (nlohmann::json::exception const& error) {
      throw Error{ErrorCode::bad_utf8, std::string{"a JSON value cannot be written: "} + error.what()};
    }
  }
};

}  // namespace dcp

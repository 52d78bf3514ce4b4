// SPDX-License-Identifier: Apache-2.0
#pragma once
// nlohmann::json documents as values of a state, for those who include <nlohmann/json.hpp> themselves, before or after this header.
// Here it is only named: it costs more to include than the rest of the library, and most states hold no JSON.

#include <dcp/base/config.hpp>
#include <dcp/core/state_dict.hpp>

#include <nlohmann/json_fwd.hpp>

#include <cmath>
#include <concepts>
#include <string>

namespace dcp {

/// A JSON document is stored as one value, with nlohmann's own spelling of it.
///
/// Throws    Error(invalid_argument) when saving a number that JSON cannot say (infinity, NaN), Error(bad_utf8) for strings that are not UTF-8
template <class Json>   // never deduced to be anything else; a template, so that its bodies wait for the type to be complete
  requires(std::same_as<Json, nlohmann::json> || std::same_as<Json, nlohmann::ordered_json>)
struct EntryOf<Json> {
  static constexpr bool is_view = false;
  static void add(StateDict& state, std::string const& name, Json& object) {
    static constexpr ValueOps ops{ValueKind::json, DType::u8, [](void const* json) { return encode(*static_cast<Json const*>(json)); },
                                  [](void* json, Value const& value) { decode(*static_cast<Json*>(json), value); }};
    state.add_value(name, {&object, &ops, false, RankPolicy::fail});
  }

 private:
  static void check(Json const& json) {
    if (json.is_number_float() && !std::isfinite(json.template get<double>()))
      throw Error{ErrorCode::invalid_argument, "a JSON value holds a number that JSON cannot say (infinity or NaN)"};
    if (json.is_structured())
      for (auto const& item : json) check(item);
  }
  static Value encode(Json const& json) {
    check(json);
    try {
      return detail::make_value(ValueKind::json, DType::u8, as_byte_span(json.dump()));
    } catch (typename Json::exception const& error) {
      throw Error{ErrorCode::bad_utf8, std::string{"a JSON value cannot be written: "} + error.what()};
    }
  }
  static void decode(Json& json, Value const& value) {
    try {
      json = Json::parse(as_text(value.payload));
    } catch (typename Json::exception const& error) {
      throw Error{ErrorCode::bad_json, std::string{"a stored JSON value cannot be read: "} + error.what()};
    }
  }
};

}  // namespace dcp

// SPDX-License-Identifier: Apache-2.0
#pragma once
// A value or an Error: the return type for outcomes that a caller plans for. Everything else throws.

#include <dcp/base/error.hpp>

#include <optional>
#include <utility>
#include <variant>

namespace dcp {

/// Example   if (Result<Layout> layout = ...) use(*layout); else std::cerr << layout.error().what();
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_{std::in_place_index<0>, std::move(value)} {}
  Result(Error error) : state_{std::in_place_index<1>, std::move(error)} {}

  explicit operator bool() const noexcept { return state_.index() == 0; }
  T& operator*() { return value(); }
  T const& operator*() const { return value(); }
  T* operator->() { return &value(); }
  T const* operator->() const { return &value(); }

  /// The value; throws the Error that stands in its place.
  T& value() {
    if (state_.index() == 1) throw std::get<1>(state_);
    return std::get<0>(state_);
  }
  T const& value() const {
    if (state_.index() == 1) throw std::get<1>(state_);
    return std::get<0>(state_);
  }
  Error const& error() const { return std::get<1>(state_); }

 private:
  std::variant<T, Error> state_;
};

}  // namespace dcp

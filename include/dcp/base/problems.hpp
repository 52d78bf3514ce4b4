// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>

#include <cstddef>
#include <string>
#include <utility>

namespace dcp {

/// Several problems as one error: the code of the first, all of the sentences.
class Problems {
 public:
  template <class = Deferred>
  void add(ErrorCode code, std::string sentence) {
    if (count_++ == 0) code_ = code;
    if (count_ <= most_listed) text_ += (text_.empty() ? "" : "\n  also      ") + std::move(sentence);
  }
  void hint(std::string text) {
    if (hint_.empty()) hint_ = std::move(text);
  }
  bool empty() const { return count_ == 0; }
  template <class = Deferred>
  void raise() const {
    if (count_ == 0) return;
    Error error{code_, count_ <= most_listed ? text_ : text_ + "\n  also      " + std::to_string(count_ - most_listed) + " more"};
    if (!hint_.empty()) error.with_hint(hint_);
    throw error;
  }

 private:
  static constexpr std::size_t most_listed = 1000;
  ErrorCode code_{};
  std::size_t count_ = 0;
  std::string text_, hint_;
};

}  // namespace dcp

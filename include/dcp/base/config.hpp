// SPDX-License-Identifier: Apache-2.0
#pragma once
// One convention that the headers above the lowest floors share.

namespace dcp {

/// The default argument of templates that are templates for one reason: a body that nobody calls then costs its parsing, and not the
/// instantiation of every container and algorithm in it. So `#include <dcp/dcp.hpp>` costs a translation unit little, and only
/// those that save or load compile the engine. (g++ 12, -fsyntax-only: 2.1 s; without it
/// four times that; nlohmann/json.hpp alone 1.2 s.)
struct Deferred;

namespace detail {
/// `T`, said so that a compiler has to wait for `D` to know it.
template <class T, class D>
struct DeferredType {
  using type = T;
};
}  // namespace detail

}  // namespace dcp

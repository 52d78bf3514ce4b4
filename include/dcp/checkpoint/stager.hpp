// SPDX-License-Identifier: Apache-2.0
#pragma once
// When the copy of a save in the background is made: inside the call, or behind it.

#include <dcp/base/config.hpp>

#include <concepts>
#include <string_view>
#include <type_traits>

namespace dcp {

/// What there is to be done until the state of one rank has been copied. Made by async_save, done in the order that a Stager chooses.
class StagingWork {
 public:
  /// Threads of the library begin to copy what this rank will write of its own bytes. Returns at once. Local.
  virtual void begin_copies() = 0;
  /// Bytes that lie in blocks of other ranks go to them. Collective; throws on all ranks what any rank threw.
  virtual void exchange() = 0;
  /// Until all copies have been made. Collective; throws on all ranks what any rank threw.
  virtual void finish_copies() = 0;

 protected:
  ~StagingWork() = default;
};

namespace detail {
template <class T>
inline constexpr bool stager_has_a_name = requires {
  { T::name } -> std::convertible_to<std::string_view>;
};
template <class T>
inline constexpr bool stager_begins = requires(StagingWork& work) { T::begin(work); };
template <class T>
inline constexpr bool stager_finishes = requires(StagingWork& work) { T::finish(work); };
/// As a local variable: fails to compile, with the sentence of what `T` lacks.
template <class T>
struct a_stager {
  static_assert(stager_has_a_name<T>, "dcp: a Stager needs  static constexpr std::string_view name  - for the report");
  static_assert(!stager_has_a_name<T> || stager_begins<T>, "dcp: a Stager needs  static void begin(dcp::StagingWork&)  - what async_save does of it before it returns");
  static_assert(!stager_has_a_name<T> || !stager_begins<T> || stager_finishes<T>, "dcp: a Stager needs  static void finish(dcp::StagingWork&)  - the rest, which Pending::wait_staged does");
};
}  // namespace detail

/// Says which part of the work is done inside async_save, and which in Pending::wait_staged. After both, all of it must be done: the sources may
/// be changed from then on.
template <class T>
concept Stager = detail::stager_has_a_name<T> && detail::stager_begins<T> && detail::stager_finishes<T>;

/// Copies inside the call: when async_save returns, the sources may be changed.
struct CopyStager {
  static constexpr std::string_view name = "copy";
  static void begin(StagingWork& work) {
    work.begin_copies();
    work.exchange();
    work.finish_copies();
  }
  static void finish(StagingWork&) {}
};

/// Copies behind the call: async_save returns before the copy is made, and the sources must stay as they are until Pending::wait_staged(), which is
/// collective, returns. For trainers that only read their weights for a while (forward and backward pass): they wait before the optimizer's step.
///
/// Devices   what lies on devices is copied in the order of the program's streams, to pinned memory of at most staging_bytes: the call only puts the copies into streams of the
///           library's, and Pending::staged_event() is what the program's streams wait for before they change the tensors. The host waits for nothing
/// Guarded   reads the sources in the call and again in wait_staged, which throws Error(changed) if something has changed. DeferredStager is so
///           where NDEBUG is not defined
/// Example   auto pending = dcp::async_save<dcp::SafeTensors, dcp::DeferredStager>(world, "ckpt", state);
///           forward_and_backward();        // reads the weights
///           pending.wait_staged();
///           optimizer_step();              // changes them
template <bool Guarded>
struct BasicDeferredStager {
  static constexpr std::string_view name = "deferred";
  static constexpr bool guarded = Guarded, deferred = true;
  static void begin(StagingWork& work) { work.begin_copies(); }
  static void finish(StagingWork& work) {
    work.exchange();
    work.finish_copies();
  }
};
#ifdef NDEBUG
using DeferredStager = BasicDeferredStager<false>;
#else
using DeferredStager = BasicDeferredStager<true>;
#endif

namespace detail {
/// A Stager without its type.
struct StagerRef {
  std::string_view name;
  bool guarded, deferred;
  void (*begin)(StagingWork&);
  void (*finish)(StagingWork&);

  template <Stager T>
  static constexpr StagerRef of() {
    bool guarded = false;
    if constexpr (requires { T::guarded; }) guarded = T::guarded;
    bool deferred = false;
    if constexpr (requires { T::deferred; }) deferred = T::deferred;
    return {T::name, guarded, deferred, [](StagingWork& work) { T::begin(work); }, [](StagingWork& work) { T::finish(work); }};
  }
};
}  // namespace detail

}  // namespace dcp

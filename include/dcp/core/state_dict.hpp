// SPDX-License-Identifier: Apache-2.0
#pragma once
// A training state as a flat, ordered map from names to views: tensors, values, and hooks to call after loading. Owns no data.

#include <dcp/base/config.hpp>
#include <dcp/core/layout.hpp>
#include <dcp/core/sharded_tensor.hpp>
#include <dcp/core/tensor_view.hpp>
#include <dcp/core/value.hpp>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace dcp {

class StateDict;

/// What happens when a per-rank value is loaded on another number of ranks than saved it.
enum class RankPolicy : std::uint8_t {
  fail,    // an error (default)
  wrap,    // rank r takes the value of rank r mod the number that saved
  rank0,   // every rank takes the value of rank 0
};

/// A value that every rank has its own of; see per_rank.
template <class T>
struct PerRank {
  T* object;
  RankPolicy policy;
};

/// Declares that each rank has its own `object` (random number generator, data loader position). It is stored once per rank.
///
/// Example   dcp::StateDict{{"rng", dcp::per_rank(rng)}, {"loader", dcp::per_rank(position, dcp::RankPolicy::wrap)}}
template <class T>
PerRank<std::remove_reference_t<T>> per_rank(T&& object, RankPolicy policy = RankPolicy::fail) {
  static_assert(std::is_lvalue_reference_v<T>, "dcp: per_rank is given a temporary, which is gone before it could be loaded into; name a variable");
  return {&object, policy};
}

/// Teaches StateDict a type of your own or of another library. Specialise with
///
///   static constexpr bool is_view;   // whether a temporary may be added, because the object only points to the data
///   static void add(StateDict& state, std::string const& name, T& object);
///
/// Types with a member state() need no specialisation.
template <class T>
struct EntryOf {
  static constexpr bool unspecialised = true;
};

// ---- what a StateDict consists of, without types ---------------------------------------------------------------------------------

/// Elements that are in nobody's memory: they are read, or made, when a save writes them.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  /// The elements of `box`, dense and row-major, to `out`. Called by several threads at once.
  virtual void read(Box const& box, std::byte* out) const = 0;
};

struct TensorEntry {
  DType dtype{};
  Layout layout;
  MemoryView memory;
  std::shared_ptr<TensorSource const> source{};   // of a state that is only saved: instead of memory, whose strides alone then count
};
struct ValueEntry {
  void* object = nullptr;
  ValueOps const* ops = nullptr;
  bool per_rank = false;
  RankPolicy policy = RankPolicy::fail;
};
struct TieEntry {
  std::string kept;   // the name under which the tensor is stored
};
struct StateEntry {
  enum class Kind : std::uint8_t { tensor, value, tie } kind{};
  std::string name;
  std::unique_ptr<TensorEntry> tensor;
  ValueEntry value;
  TieEntry tie;
  NameJoints joints{};   // of the name; see StateDict::joint_of_object
};
struct AfterLoad {
  std::string name;
  void* object;
  void (*call)(void*);
};

namespace detail {
template <class T>
struct is_sharded_tensor : std::false_type {};
template <class T, class P, class S>
struct is_sharded_tensor<ShardedTensor<T, P, S>> : std::true_type {};
template <class T>
inline constexpr bool is_per_rank = false;
template <class T>
inline constexpr bool is_per_rank<PerRank<T>> = true;
template <class T>
concept HasState = requires(T& object) { object.state(); };
template <class T>
concept HasAfterLoad = requires(T& object) { object.after_load(); };
template <class T>
concept HasEntryOf = !requires { EntryOf<T>::unspecialised; };
template <class T>
constexpr bool may_be_temporary() {
  if constexpr (HasEntryOf<T>) return EntryOf<T>::is_view;
  else return is_sharded_tensor<T>::value || is_tensor_view<T> || is_per_rank<T> || std::is_same_v<T, StateDict>;
}

template <class T>
struct a_state_of_known_type {
  static constexpr bool value = is_sharded_tensor<T>::value || is_tensor_view<T> || is_per_rank<T> || std::is_same_v<T, StateDict> || HasState<T> || HasEntryOf<T> || is_value<T>;
  static_assert(value,
                "dcp: this type is no state; a state holds ShardedTensor, TensorView, numbers, bool, std::string, vectors of numbers or std::byte, nlohmann::json, and types "
                "with a member  StateDict state()");
};
template <class T, bool Temporary>
struct entry_outlives_the_call {
  static_assert(!Temporary || may_be_temporary<T>(), "dcp: a state entry is bound to a temporary, which is gone before it could be loaded into; name a variable");
};
template <class T, bool Const>
struct entry_can_be_loaded {
  static_assert(!Const || may_be_temporary<T>(), "dcp: a state entry is const, and loading writes into it; bind a variable that can change");
};
template <int Axes>
struct no_partial_axes {
  static_assert(Axes == 0, "dcp: a tensor with Partial axes holds unreduced terms and has no single value to save; all-reduce it first [Partial axes == 0]");
};
template <class Returned>
struct state_returns_a_state_dict {
  static_assert(std::is_same_v<Returned, StateDict>, "dcp: the member state() of this type does not return a dcp::StateDict; make it  StateDict state()");
};
}  // namespace detail

/// One line of a braced state. Valid until the end of the full expression that it stands in; a StateDict copies what it needs.
class Entry {
 public:
  template <class T>
  Entry(std::string_view name, T&& object) : name_{name}, object_{const_cast<void*>(static_cast<void const*>(__builtin_addressof(object)))}, add_{&add_to<std::remove_cvref_t<T>>} {
    using Plain = std::remove_cvref_t<T>;
    [[maybe_unused]] detail::a_state_of_known_type<Plain> known;
    [[maybe_unused]] detail::entry_outlives_the_call<Plain, !std::is_lvalue_reference_v<T>> alive;
    [[maybe_unused]] detail::entry_can_be_loaded<Plain, std::is_const_v<std::remove_reference_t<T>>> writable;
  }
  inline Entry(std::string_view name, StateDict const& nested);

 private:
  friend class StateDict;
  template <class T>
  static void add_to(StateDict& state, std::string const& name, void* object);

  std::string_view name_;
  void* object_;
  void (*add_)(StateDict&, std::string const&, void*);
};

/// A flat, ordered map of names to views.
///
/// Names     UTF-8. A nested state's names are prefixed with its own and a dot: {"model", model} gives "model.linear.weight"
/// Takes     tensors, numbers, bool, std::string, bytes, JSON, vectors of numbers, per_rank(x), types with state(), other states
/// Throws    Error(bad_utf8) for a name that is none. A name that comes twice is an error of the save or load
/// Example   dcp::StateDict state{{"model", model}, {"optimizer", {{"step", step}, {"lr", lr}}}, {"rng", dcp::per_rank(rng)}};
class StateDict {
 public:
  StateDict() = default;
  template <class = Deferred>
  StateDict(std::initializer_list<Entry> entries) {
    for (auto const& entry : entries) entry.add_(*this, std::string{entry.name_}, entry.object_);
  }
  /// The state of an object, so that save(world, place, model) works.
  template <class T>
    requires(detail::HasState<T> && !std::is_same_v<std::remove_cv_t<T>, StateDict>)
  StateDict(T& object) {
    [[maybe_unused]] detail::state_returns_a_state_dict<decltype(object.state())> check;
    add_object(std::string{}, object);
  }
  template <class Name, class T>
    requires std::convertible_to<Name, std::string_view>
  StateDict(Name&&, T&&) {
    static_assert(sizeof(Name) == 0, "dcp: a state is a list of entries, and a brace pair is missing; write {{\"name\", x}}");
  }

  StateDict(StateDict&& other) noexcept : entries_{std::move(other.entries_)}, hooks_{std::move(other.hooks_)}, revision_{std::exchange(other.revision_, 0)} { other.entries_.clear(), other.hooks_.clear(); }
  StateDict& operator=(StateDict&& other) noexcept {
    entries_.swap(other.entries_), hooks_.swap(other.hooks_), std::swap(revision_, other.revision_);
    return *this;
  }
  StateDict(StateDict const& other) { append(std::string{}, other); }
  StateDict& operator=(StateDict const& other) {
    StateDict copy{other};
    return *this = std::move(copy);
  }

  /// Adds one entry, as a line of the braced form does.
  template <class T>
  StateDict& add(std::string_view name, T&& object) {
    Entry const entry{name, std::forward<T>(object)};
    entry.add_(*this, std::string{name}, entry.object_);
    return *this;
  }
  /// Declares that tensor `name` is `kept` under another name: stored once, restored under both. Tensors in the same memory are
  /// found to be tied without a declaration.
  template <class = Deferred>
  StateDict& tie(std::string name, std::string kept) {
    add_tie(std::move(name), std::move(kept));
    return *this;
  }

  std::size_t size() const { return entries_.size(); }
  bool empty() const { return entries_.empty(); }

  // For drivers and for EntryOf specialisations.
  std::vector<StateEntry> const& entries() const { return entries_; }
  std::vector<AfterLoad> const& hooks() const { return hooks_; }
  /// States of one revision have the same entries, which point to the same memory. 0 of an empty one.
  std::uint64_t revision() const { return revision_; }
  template <class = Deferred>
  void add_tensor(std::string name, DType dtype, Layout const& layout, MemoryView const& memory) {
    StateEntry& entry = insert(std::move(name), StateEntry::Kind::tensor);
    entry.tensor = std::make_unique<TensorEntry>(TensorEntry{dtype, layout, memory});
  }
  /// A tensor that can only be saved: all of it, on every rank that lists it.
  template <class = Deferred>
  StateEntry& add_source(std::string name, DType dtype, Extents const& shape, std::shared_ptr<TensorSource const> source) {
    StateEntry& entry = insert(std::move(name), StateEntry::Kind::tensor);
    auto* const address = reinterpret_cast<std::byte*>(const_cast<TensorSource*>(source.get()));   // of which only differences are taken
    entry.tensor = std::make_unique<TensorEntry>(TensorEntry{dtype, plain_layout(shape), {address, row_major_strides(shape)}, std::move(source)});
    return entry;
  }
  template <class = Deferred>
  StateEntry& add_tie(std::string name, std::string kept) {
    StateEntry& entry = insert(std::move(name), StateEntry::Kind::tie);
    entry.tie.kept = std::move(kept);
    return entry;
  }
  template <class = Deferred>
  void add_part(std::string const& name, DType dtype, detail::LocalPart const& part) {
    if (part.held) add_tensor(name, dtype, part.layout, part.memory);
  }
  template <class = Deferred>
  StateEntry& add_value(std::string name, ValueEntry value) {
    StateEntry& entry = insert(std::move(name), StateEntry::Kind::value);
    entry.value = value;
    return entry;
  }
  /// Marks the joint between an object with state() and what is in it. Objects within objects have none between them: the layers of a model are names with dots, as
  /// modules have them in PyTorch, and not levels.
  static constexpr std::uint32_t joint_of_object = 0x8000'0000u;
  template <class = Deferred>
  void append(std::string const& prefix, StateDict const& other, bool of_object = false) {
    for (auto const& from : other.entries_) {
      StateEntry& entry = insert(joined(prefix, from.name), from.kind);
      if (!prefix.empty() && !from.name.empty()) entry.joints.push_back(static_cast<std::uint32_t>(prefix.size()) | (of_object ? joint_of_object : 0));
      for (auto const joint : from.joints)
        if (!of_object || prefix.empty() || (joint & joint_of_object) == 0) entry.joints.push_back(joint + static_cast<std::uint32_t>(entry.name.size() - from.name.size()));
      if (from.tensor) entry.tensor = std::make_unique<TensorEntry>(*from.tensor);
      entry.value = from.value;
      if (from.kind == StateEntry::Kind::tie) entry.tie.kept = joined(prefix, from.tie.kept);
    }
    for (auto const& hook : other.hooks_) hooks_.push_back({joined(prefix, hook.name), hook.object, hook.call});
  }

 private:
  friend class Entry;

  template <class = Deferred>
  static std::string joined(std::string const& prefix, std::string const& name) {
    return prefix.empty() ? name : name.empty() ? prefix : prefix + '.' + name;
  }
  template <class = Deferred>
  StateEntry& insert(std::string name, StateEntry::Kind kind) {
    if (auto const bad = first_invalid_utf8(name); bad != std::string::npos)
      throw Error{ErrorCode::bad_utf8, "the name of a state entry is not UTF-8 after " + json_quoted(std::string_view{name}.substr(0, bad))};
    if (name == "__metadata__") throw Error{ErrorCode::invalid_argument, "a state entry cannot be named __metadata__; the name is taken by the safetensors format"};
    StateEntry& entry = entries_.emplace_back();
    entry.kind = kind;
    entry.name = std::move(name);
    static std::atomic<std::uint64_t> revisions{0};
    revision_ = ++revisions;
    return entry;
  }
  template <class T>
  void add_object(std::string const& name, T& object) {
    if constexpr (std::is_same_v<decltype(object.state()), StateDict>) append(name, object.state(), true);
    if constexpr (detail::HasAfterLoad<T>) hooks_.push_back({name, &object, [](void* o) { static_cast<T*>(o)->after_load(); }});
  }

  std::vector<StateEntry> entries_;
  std::vector<AfterLoad> hooks_;
  std::uint64_t revision_ = 0;
};

inline Entry::Entry(std::string_view name, StateDict const& nested)
    : name_{name}, object_{const_cast<StateDict*>(&nested)}, add_{[](StateDict& state, std::string const& prefix, void* object) { state.append(prefix, *static_cast<StateDict const*>(object)); }} {}

template <class T>
void Entry::add_to(StateDict& state, std::string const& name, void* object) {
  T& x = *static_cast<T*>(object);
  if constexpr (detail::HasEntryOf<T>) {
    EntryOf<T>::add(state, name, x);
  } else if constexpr (detail::is_sharded_tensor<T>::value) {
    [[maybe_unused]] detail::no_partial_axes<T::partial_axes> check;
    state.add_part(name, dtype_of<typename T::element_type>, x.part_);
  } else if constexpr (detail::is_tensor_view<T>) {
    state.add_tensor(name, x.dtype(), plain_layout(x.shape()), x.memory());
  } else if constexpr (std::is_same_v<T, StateDict>) {
    state.append(name, x);
  } else if constexpr (detail::is_per_rank<T>) {
    using Object = std::remove_pointer_t<decltype(x.object)>;
    [[maybe_unused]] detail::entry_can_be_loaded<Object, std::is_const_v<Object>> writable;
    if constexpr (detail::HasEntryOf<Object>) {
      StateDict one;
      EntryOf<Object>::add(one, name, *x.object);
      for (auto const& entry : one.entries()) {
        if (entry.kind != StateEntry::Kind::value) throw Error{ErrorCode::invalid_argument, name + ": per_rank holds a tensor; give it a Placement instead"};
        state.add_value(entry.name, {entry.value.object, entry.value.ops, true, x.policy});
      }
    } else {
      static_assert(detail::is_value<std::remove_const_t<Object>>, "dcp: per_rank takes a value (a number, std::string, bytes, JSON, a vector of numbers); give tensors a Placement instead");
      state.add_value(name, {const_cast<void*>(static_cast<void const*>(x.object)), detail::value_ops<std::remove_const_t<Object>>(), true, x.policy});
    }
  } else if constexpr (detail::HasState<T>) {
    [[maybe_unused]] detail::state_returns_a_state_dict<decltype(x.state())> check;
    state.add_object(name, x);
  } else if constexpr (detail::is_value<T>) {
    state.add_value(name, {&x, detail::value_ops<T>(), false, RankPolicy::fail});
  }
}

}  // namespace dcp

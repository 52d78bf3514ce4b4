// SPDX-License-Identifier: Apache-2.0
#pragma once
// The names of a state against those of a checkpoint: renamed, cut, joined, transposed. One list of rules, for saving and for loading.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/problems.hpp>
#include <dcp/core/box.hpp>
#include <dcp/core/dtype.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

/// The dimensions of `x` in another order: of the result, dimension d is order[d] of `x`.
constexpr Extents permuted(Extents const& x, Extents const& order) {
  Extents result = order;
  for (int d = 0; d < order.rank(); ++d) result[d] = x[static_cast<int>(order[d])];
  return result;
}
constexpr Box permuted(Box const& box, Extents const& order) { return {permuted(box.origin, order), permuted(box.shape, order)}; }

/// The dimensions as they are.
constexpr Extents in_given_order(int rank) {
  Extents order = Extents::filled(rank, 0);
  for (int d = 0; d < rank; ++d) order[d] = d;
  return order;
}

/// A box of one tensor that is a box of another, its dimensions perhaps in another order.
struct PlacedBox {
  std::uint32_t tensor = 0;   // the one, by number
  Box from;                   // of it
  Extents order;              // dimension d of the other is dimension order[d] of the one
  Extents at;                 // where in the other the box begins

  template <class = Deferred>
  static PlacedBox whole(std::uint32_t tensor, Extents const& shape) { return {tensor, Box::whole(shape), in_given_order(shape.rank()), Extents::filled(shape.rank(), 0)}; }
  Box region() const { return {at, permuted(from.shape, order)}; }
  /// A box within `from`, in the other tensor.
  constexpr Box placed(Box const& part) const {
    Box result = permuted(part, order);
    for (int d = 0; d < at.rank(); ++d) result.origin[d] += at[d] - from.origin[static_cast<int>(order[d])];
    return result;
  }
  /// The inverse of placed(), of a box of any place.
  constexpr Box original(Box const& part) const {
    Box result = from;
    for (int d = 0; d < at.rank(); ++d) {
      auto const dim = static_cast<int>(order[d]);
      result.origin[dim] = part.origin[d] - at[d] + from.origin[dim];
      result.shape[dim] = part.shape[d];
    }
    return result;
  }
  bool in_order() const { return order == in_given_order(order.rank()); }
};

/// A tensor, and the boxes of others that it is made of.
struct MappedTensor {
  std::string name;
  DType dtype{};
  Extents shape;
  std::vector<PlacedBox> from;
  bool cut = false;   // whether it is anything but one other tensor as it is
};

/// Says under which names, and in which pieces, a checkpoint has the tensors of a state. One object serves both directions: SaveOptions::names and LoadOptions::names.
///
/// Rules     apply one after the other to the names of the state, and the last result is what the checkpoint has; a name that a rule does not speak of stays. In a name
///           given to a rule, `*` stands for one or more characters other than '.', the same on both sides
/// Law       every element of the state has one place in the checkpoint and every element there comes from one of the state, or it is an error that says where not
/// Loads     read only the ranges that they need, whatever is cut, joined or transposed, quantized tensors included
/// Values    are renamed as tensors are. Of tied names, the tensor can be renamed, not cut
/// Names     in reports, errors and policies are the checkpoint's, but for what is put together of several: that has its name in the state
/// Example   a model with fused weights, and a checkpoint as transformers writes it
///           dcp::NameMap names;
///           names.drop("module.").rename_prefix("decoder.", "model.layers.")
///               .concat("model.layers.*.qkv.weight", {{"model.layers.*.self_attn.q_proj.weight", 4096}, {"model.layers.*.self_attn.k_proj.weight", 1024}, {"model.layers.*.self_attn.v_proj.weight", 1024}})
///               .concat("model.layers.*.gate_up.weight", {"model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"});
///           dcp::load<dcp::SafeTensors>(world, "Llama", {{"decoder", model}}, {.names = names});
class NameMap {
 public:
  /// Elements [begin, begin + size) of a tensor along a dimension, by default all of it; where only others of a list have sizes, an equal part of what they leave.
  struct Slice {
    static constexpr std::int64_t all = -1;
    std::string name;
    std::int64_t begin = 0, size = all;

    Slice(char const* tensor) : name{tensor} {}
    Slice(std::string tensor) : name{std::move(tensor)} {}
    Slice(std::string tensor, std::int64_t elements) : name{std::move(tensor)}, size{elements} {}
    Slice(std::string tensor, std::int64_t first, std::int64_t elements) : name{std::move(tensor)}, begin{first}, size{elements} {}
  };

  /// The state's `state` is the checkpoint's `stored`.
  template <class = Deferred>
  NameMap& rename(std::string state, std::string stored) { return add({Kind::rename, {std::move(state)}, {std::move(stored)}, 0, {}}); }
  /// Names that begin with `state` begin with `stored` in the checkpoint; either may be empty.
  template <class = Deferred>
  NameMap& rename_prefix(std::string state, std::string stored) { return add({Kind::prefix, {std::move(state)}, {std::move(stored)}, 0, {}}); }
  /// What wrappers put into names, as "module." or "_orig_mod.", at the beginning and behind every '.': not in the checkpoint's.
  template <class = Deferred>
  NameMap& drop(std::string component) { return add({Kind::drop, {std::move(component)}, {""}, 0, {}}); }
  /// The state's tensor has the dimensions of the checkpoint's in another order: its dimension d is dimension order[d] there.
  template <class = Deferred>
  NameMap& transpose(std::string state, std::string stored, std::vector<int> order = {1, 0}) { return add({Kind::transpose, {std::move(state)}, {std::move(stored)}, 0, std::move(order)}); }
  /// The state's tensor is those of the checkpoint, one behind the other along `dim`. A name may come several times, with slices of it.
  template <class = Deferred>
  NameMap& concat(std::string state, std::vector<Slice> stored, int dim = 0) { return add({Kind::concat, {std::move(state)}, std::move(stored), dim, {}}); }
  /// The state's tensors are slices of the checkpoint's, which is them one behind the other along `dim`: the inverse of concat.
  template <class = Deferred>
  NameMap& split(std::vector<Slice> state, std::string stored, int dim = 0) { return add({Kind::split, std::move(state), {std::move(stored)}, dim, {}}); }

  bool empty() const { return rules_.empty(); }
  /// Equal where the rules are.
  template <class = Deferred>
  std::string text() const {
    std::string out;
    for (auto const& rule : rules_) {
      out += std::to_string(static_cast<int>(rule.kind)) + '/' + std::to_string(rule.dim);
      for (auto const dim : rule.order) out += ',' + std::to_string(dim);
      for (auto const* side : {&rule.state, &rule.stored})
        for (auto const& slice : *side) out += '|' + std::to_string(slice.name.size()) + ':' + slice.name + '@' + std::to_string(slice.begin) + '+' + std::to_string(slice.size);
      out += ';';
    }
    return out;
  }

  /// The name that the checkpoint has for a value of the state.
  template <class = Deferred>
  std::string stored_name(std::string name) const {
    for (auto const& rule : rules_) name = renamed(rule, std::move(name), false);
    return name;
  }
  /// The way back. What drop() leaves out stays out, as does a prefix that became nothing.
  template <class = Deferred>
  std::string state_name(std::string name) const {
    for (auto rule = rules_.rbegin(); rule != rules_.rend(); ++rule) name = renamed(*rule, std::move(name), true);
    return name;
  }

  /// What the checkpoint has of tensors of the state; each knows, by their numbers here, of what it is made. In no order.
  /// Throws    Error(invalid_argument), Error(missing_entry), Error(shape_mismatch), Error(dtype_mismatch), Error(duplicate_entry): where the rules and the tensors are no
  ///           bijection, all problems listed
  template <class = Deferred>
  std::vector<MappedTensor> stored_tensors(std::vector<MappedTensor> tensors) const {
    for (auto const& rule : rules_) tensors = apply(rule, std::move(tensors), false);
    return distinct(std::move(tensors));
  }
  /// What a state that these rules are for would have of the tensors of a checkpoint, as of state_name().
  template <class = Deferred>
  std::vector<MappedTensor> state_tensors(std::vector<MappedTensor> tensors) const {
    for (auto rule = rules_.rbegin(); rule != rules_.rend(); ++rule) tensors = apply(*rule, std::move(tensors), true);
    return distinct(std::move(tensors));
  }

 private:
  enum class Kind : std::uint8_t { rename, prefix, drop, transpose, concat, split };
  struct Rule {
    Kind kind;
    std::vector<Slice> state, stored;
    int dim;
    std::vector<int> order;
  };

  template <class = Deferred>
  NameMap& add(Rule rule) {
    auto const wrong = [&](std::string const& sentence) { throw Error{ErrorCode::invalid_argument, "names: " + sentence}; };
    if (rule.state.empty() || rule.stored.empty()) wrong("a rule without names");
    if (rule.kind == Kind::drop && !(rule.state[0].name.size() > 1 && rule.state[0].name.ends_with('.'))) wrong("what is dropped is a whole component, and ends with '.'");
    if (rule.dim < 0 || rule.dim >= max_rank) wrong("a dimension " + std::to_string(rule.dim));
    if (rule.kind == Kind::transpose) {
      std::vector<int> sorted = rule.order;
      detail::sort(sorted);
      for (std::size_t d = 0; d < sorted.size(); ++d)
        if (sorted[d] != static_cast<int>(d) || sorted.size() > max_rank) wrong(rule.state[0].name + ": this is no order of dimensions");
    }
    if (rule.kind != Kind::prefix && rule.kind != Kind::drop) {
      auto const stars = [](Slice const& slice) { return std::count(slice.name.begin(), slice.name.end(), '*'); };
      for (auto const* side : {&rule.state, &rule.stored})
        for (auto const& slice : *side) {
          if (stars(slice) != stars(rule.state[0])) wrong(slice.name + " and " + rule.state[0].name + " have different numbers of *");
          if (slice.begin < 0 || (slice.size < 1 && slice.size != Slice::all) || (slice.begin > 0 && slice.size == Slice::all)) wrong(slice.name + ": this is no slice");
        }
    }
    rules_.push_back(std::move(rule));
    return *this;
  }

  // Whether `name` has the form of `pattern`, and what its stars stand for.
  template <class = Deferred>
  static bool matches(std::string_view pattern, std::string_view name, std::vector<std::string_view>& captures) {
    captures.clear();
    return matches_from(pattern, name, captures);
  }
  template <class = Deferred>
  static bool matches_from(std::string_view pattern, std::string_view name, std::vector<std::string_view>& captures) {
    auto const star = pattern.find('*');
    if (star == std::string_view::npos) return pattern == name;
    if (!name.starts_with(pattern.substr(0, star))) return false;
    name.remove_prefix(star);
    pattern.remove_prefix(star + 1);
    std::size_t const most = std::min(name.find('.'), name.size());
    for (std::size_t size = most; size > 0; --size) {
      captures.push_back(name.substr(0, size));
      if (matches_from(pattern, name.substr(size), captures)) return true;
      captures.pop_back();
    }
    return false;
  }
  template <class = Deferred>
  static std::string filled(std::string_view pattern, std::vector<std::string_view> const& captures) {
    std::string name;
    std::size_t next = 0;
    for (char const c : pattern)
      if (c == '*') name += captures[next++];
      else name += c;
    return name;
  }
  template <class = Deferred>
  static std::string without(std::string name, std::string const& component) {
    for (std::size_t at = 0; at < name.size();) {
      if (std::string_view{name}.substr(at).starts_with(component)) {
        name.erase(at, component.size());
        continue;
      }
      auto const dot = name.find('.', at);
      if (dot == std::string::npos) break;
      at = dot + 1;
    }
    return name;
  }

  // A name by a rule that only names; others leave it.
  template <class = Deferred>
  static std::string renamed(Rule const& rule, std::string name, bool backwards) {
    std::string const &here = (backwards ? rule.stored : rule.state)[0].name, &there = (backwards ? rule.state : rule.stored)[0].name;
    std::vector<std::string_view> captures;
    if (rule.kind == Kind::rename && matches(here, name, captures)) return filled(there, captures);
    if (rule.kind == Kind::prefix && !(backwards && here.empty()) && name.starts_with(here)) return there + name.substr(here.size());
    if (rule.kind == Kind::drop && !backwards) return without(std::move(name), here);
    return name;
  }
  // From the names of one side of a rule to those of the other.
  template <class = Deferred>
  static std::vector<MappedTensor> apply(Rule const& rule, std::vector<MappedTensor> tensors, bool backwards) {
    std::vector<Slice> const &here = backwards ? rule.stored : rule.state, &there = backwards ? rule.state : rule.stored;
    std::vector<std::string_view> captures;
    switch (rule.kind) {
      case Kind::rename:
      case Kind::prefix:
      case Kind::drop:
        for (auto& tensor : tensors) tensor.name = renamed(rule, std::move(tensor.name), backwards);
        return tensors;
      case Kind::transpose: {
        Problems problems;
        for (auto& tensor : tensors) {
          if (!matches(here[0].name, tensor.name, captures)) continue;
          if (tensor.shape.rank() != static_cast<int>(rule.order.size())) {
            problems.add(ErrorCode::shape_mismatch, "names: " + tensor.name + ": the rule orders " + std::to_string(rule.order.size()) + " dimensions, and it has shape " + to_string(tensor.shape));
            continue;
          }
          if (bits_of(tensor.dtype) < 8) problems.add(ErrorCode::unsupported, whole_bytes(tensor));
          // The rule says what the state's dimensions are; backwards they are looked for.
          Extents order = tensor.shape;
          for (int d = 0; d < order.rank(); ++d) {
            int const other = rule.order[static_cast<std::size_t>(d)];
            if (backwards) order[d] = other;
            else order[other] = d;
          }
          tensor.name = filled(there[0].name, captures);
          tensor.shape = permuted(tensor.shape, order);
          for (auto& box : tensor.from) box.at = permuted(box.at, order), box.order = permuted(box.order, order);
          tensor.cut = true;
        }
        problems.raise();
        return tensors;
      }
      case Kind::concat:
      case Kind::split: return (rule.kind == Kind::split) != backwards ? joined(std::move(tensors), here, there[0].name, rule.dim) : divided(std::move(tensors), here[0].name, there, rule.dim);
    }
    return tensors;
  }
  static std::string whole_bytes(MappedTensor const& tensor) { return "names: " + tensor.name + ": tensors of elements smaller than a byte can be renamed, not cut or transposed"; }

  // Adds elements [begin, begin + size) along `dim` of `part` to `to`, where they begin at `at`.
  template <class = Deferred>
  static void add_slice(MappedTensor const& part, int dim, std::int64_t begin, std::int64_t size, std::int64_t at, MappedTensor& to) {
    for (auto const& box : part.from) {
      Box const region = box.region();
      Box cut = region;
      std::int64_t const first = std::max(begin, region.origin[dim]), last = std::min(begin + size, region.origin[dim] + region.shape[dim]);
      if (last <= first) continue;
      cut.origin[dim] = first, cut.shape[dim] = last - first;
      PlacedBox placed{box.tensor, box.original(cut), box.order, cut.origin};
      placed.at[dim] += at - begin;
      to.from.push_back(placed);
    }
  }
  struct Range {
    std::int64_t begin, end;
  };
  // Whether the ranges are all of [0, extent), each element once; else in words why not.
  template <class = Deferred>
  static std::string flaw(std::vector<Range> ranges, std::int64_t extent) {
    std::sort(ranges.begin(), ranges.end(), [](Range const& a, Range const& b) { return a.begin < b.begin; });
    std::int64_t at = 0;
    for (auto const& range : ranges) {
      if (range.begin < at) return "element " + std::to_string(range.begin) + " along the dimension is used twice";
      if (range.begin > at) break;
      at = range.end;
    }
    if (at < extent) return "element " + std::to_string(at) + " along the dimension is not used";
    return at > extent ? "the slices end at " + std::to_string(at) + ", and the dimension has " + std::to_string(extent) : std::string{};
  }

  // Several tensors, one behind the other.
  template <class = Deferred>
  static std::vector<MappedTensor> joined(std::vector<MappedTensor> tensors, std::vector<Slice> const& parts, std::string const& whole, int dim) {
    struct Group {
      std::vector<std::string> captures;
      std::map<std::string, std::size_t> members;   // pattern -> tensor
    };
    std::map<std::string, Group> groups;   // by the name of what they become
    std::vector<bool> taken(tensors.size(), false);
    std::vector<std::string_view> captures;
    for (std::size_t t = 0; t < tensors.size(); ++t)
      for (auto const& part : parts) {
        if (taken[t] || !matches(part.name, tensors[t].name, captures)) continue;
        Group& group = groups[filled(whole, captures)];
        group.captures.assign(captures.begin(), captures.end());
        group.members.emplace(part.name, t);
        taken[t] = true;
      }
    Problems problems;
    std::vector<MappedTensor> result;
    for (auto const& [name, group] : groups) {
      std::vector<std::string_view> const views(group.captures.begin(), group.captures.end());
      MappedTensor made{name, {}, {}, {}, true};
      std::map<std::size_t, std::vector<Range>> used;
      std::int64_t at = 0;
      bool usable = true;
      for (std::size_t p = 0; p < parts.size() && usable; ++p) {
        auto const member = group.members.find(parts[p].name);
        if (member == group.members.end()) {
          problems.add(ErrorCode::missing_entry, "names: " + name + " is made of several tensors, and there is no " + filled(parts[p].name, views));
          usable = false;
          break;
        }
        MappedTensor const& part = tensors[member->second];
        if (p == 0) made.dtype = part.dtype, made.shape = part.shape;
        Extents other = part.shape;
        if (dim < other.rank() && dim < made.shape.rank()) other[dim] = made.shape[dim];
        if (bits_of(part.dtype) < 8) problems.add(ErrorCode::unsupported, whole_bytes(part)), usable = false;
        else if (part.dtype != made.dtype) problems.add(ErrorCode::dtype_mismatch, "names: " + name + " is made of " + std::string{to_string(made.dtype)} + " and, in " + part.name + ", " + std::string{to_string(part.dtype)}), usable = false;
        else if (dim >= part.shape.rank() || !(other == made.shape)) problems.add(ErrorCode::shape_mismatch, "names: " + name + " is made of " + to_string(made.shape) + " and, in " + part.name + ", " + to_string(part.shape) + ", joined along dimension " + std::to_string(dim)), usable = false;
        if (!usable) break;
        std::int64_t const size = parts[p].size == Slice::all ? part.shape[dim] : parts[p].size;
        used[member->second].push_back({parts[p].begin, parts[p].begin + size});
        add_slice(part, dim, parts[p].begin, size, at, made);
        at += size;
      }
      if (!usable) continue;
      for (auto const& [t, ranges] : used)
        if (std::string const why = flaw(ranges, tensors[t].shape[dim]); !why.empty()) problems.add(ErrorCode::shape_mismatch, "names: " + tensors[t].name + ' ' + to_string(tensors[t].shape) + " as part of " + name + ": " + why);
      made.shape[dim] = at;
      result.push_back(std::move(made));
    }
    problems.raise();
    for (std::size_t t = 0; t < tensors.size(); ++t)
      if (!taken[t]) result.push_back(std::move(tensors[t]));
    return result;
  }

  // One tensor, as several.
  template <class = Deferred>
  static std::vector<MappedTensor> divided(std::vector<MappedTensor> tensors, std::string const& whole, std::vector<Slice> const& parts, int dim) {
    Problems problems;
    std::vector<MappedTensor> result;
    std::vector<std::string_view> captures;
    for (auto& tensor : tensors) {
      if (!matches(whole, tensor.name, captures)) {
        result.push_back(std::move(tensor));
        continue;
      }
      auto const wrong = [&](std::string const& sentence) { problems.add(ErrorCode::shape_mismatch, "names: " + tensor.name + ' ' + to_string(tensor.shape) + ": " + sentence); };
      if (bits_of(tensor.dtype) < 8) {
        problems.add(ErrorCode::unsupported, whole_bytes(tensor));
        continue;
      }
      if (dim >= tensor.shape.rank()) {
        wrong("it has no dimension " + std::to_string(dim) + " to be cut along");
        continue;
      }
      std::int64_t rest = tensor.shape[dim], unsized = 0;
      for (auto const& part : parts) part.size == Slice::all ? ++unsized : rest -= part.size;
      if (rest < 0 || (unsized == 0 && rest != 0) || (unsized > 0 && rest % unsized != 0)) {
        wrong("dimension " + std::to_string(dim) + " cannot be cut as the rule says, " + std::to_string(rest) + (unsized == 0 ? " would be left" : " would be left for " + std::to_string(unsized) + " equal parts"));
        continue;
      }
      std::map<std::string, std::pair<MappedTensor, std::vector<Range>>> made;
      std::int64_t at = 0;
      for (auto const& part : parts) {
        std::int64_t const size = part.size == Slice::all ? rest / unsized : part.size;
        std::string const name = filled(part.name, captures);
        auto& [to, ranges] = made.try_emplace(name, MappedTensor{name, tensor.dtype, tensor.shape, {}, true}, std::vector<Range>{}).first->second;
        add_slice(tensor, dim, at, size, part.begin, to);
        ranges.push_back({part.begin, part.begin + size});
        at += size;
      }
      for (auto& [name, entry] : made) {
        std::int64_t extent = 0;
        for (auto const& range : entry.second) extent = std::max(extent, range.end);
        if (std::string const why = flaw(entry.second, extent); !why.empty()) wrong("as " + name + ": " + why);
        entry.first.shape[dim] = extent;
        result.push_back(std::move(entry.first));
      }
    }
    problems.raise();
    return result;
  }

  template <class = Deferred>
  static std::vector<MappedTensor> distinct(std::vector<MappedTensor> tensors) {
    std::vector<std::string_view> names;
    for (auto const& tensor : tensors) names.push_back(tensor.name);
    detail::sort(names);
    Problems problems;
    for (std::size_t i = 1; i < names.size(); ++i)
      if (names[i] == names[i - 1] && (i < 2 || names[i] != names[i - 2])) problems.add(ErrorCode::duplicate_entry, "names: two tensors would have the name " + std::string{names[i]});
    problems.raise();
    return tensors;
  }

  std::vector<Rule> rules_;
};

}  // namespace dcp

// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a state wants against what a checkpoint holds: every difference found before anything is read.

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/core/cast.hpp>
#include <dcp/plan/arrangement.hpp>
#include <dcp/plan/catalog.hpp>
#include <dcp/plan/schema.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

/// What to do with an entry where the checkpoint differs.
struct EntryPolicy {
  bool allow_missing = false, zero_missing = false, allow_unexpected = false, keep_shape = false, cast = false;
};

/// How a wanted tensor is served.
struct WantedTensor {
  enum class How : std::uint8_t { load, keep, zero } how = How::load;
  CatalogTensor const* stored = nullptr;
  bool shared = false;   // an earlier entry reads the same stored tensor
};
struct WantedValue {
  Value const* stored = nullptr;   // nullptr: keeps its value
};
struct Comparison {
  std::vector<WantedTensor> tensors;   // in the order of the tensors asked for
  std::vector<WantedValue> values;
  std::vector<std::string> missing, unexpected, cast, kept, decoded;
};

namespace detail {
// Whether `x` is a value of To, and which.
template <class To, class From>
bool exactly(From x, To& out) {
  if constexpr (std::is_same_v<From, bool>) {
    return exactly<To>(static_cast<std::uint8_t>(x), out);
  } else if constexpr (std::is_same_v<To, bool>) {
    out = x == From{1};
    return x == From{0} || x == From{1};
  } else if constexpr (std::is_integral_v<From> && std::is_integral_v<To>) {
    out = static_cast<To>(x);
    return std::in_range<To>(x);
  } else if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    // The ends of To's range as powers of two, which every float type holds exactly.
    constexpr From high = static_cast<From>(std::numeric_limits<To>::max() / 2 + 1) * From{2}, low = std::is_signed_v<To> ? -high : From{0};
    if (!(x >= low && x < high)) return false;
    out = static_cast<To>(x);
    return static_cast<From>(out) == x;
  } else if constexpr (std::is_integral_v<From>) {
    out = static_cast<To>(x);
    From back{};
    return exactly<From>(out, back) && back == x;
  } else {
    out = static_cast<To>(x);
    return static_cast<From>(out) == x;
  }
}

// The number in `value` as another number type, if that holds it exactly.
template <class = Deferred>
bool exact_number(Value const& value, DType to, Value& out) {
  bool exact = false;
  with_number_type(value.dtype, [&](auto from) {
    with_number_type(to, [&](auto target) {
      using From = decltype(from);
      using To = decltype(target);
      if (value.payload.size() != sizeof(From)) return;
      From x{};
      if constexpr (std::is_same_v<From, bool>) x = value.payload[0] != std::byte{0};
      else x = load_little_endian<From>(value.payload.data());
      To y{};
      exact = exactly<To>(x, y);
      out = {ValueKind::number, to, Bytes(sizeof(To)), {}};
      std::memcpy(out.payload.data(), &y, sizeof y);
    });
  });
  return exact;
}
}  // namespace detail

/// `tensors`, `values`: in name order. `names_tied_to(name)`: other names under which the state knows the same tensor, tried when the checkpoint lacks `name`.
/// `policy_of(name)`: the policy of a name. `assembled`: of each tensor, where names are mapped; `taken`: what is then used of the catalog.
///
/// Throws    one Error that lists every missing, unexpected and mismatched entry that no policy allows; the code is that of the first
template <class TiedNames, class PolicyOf>
Comparison compare(std::vector<TensorSpec> const& tensors, std::vector<SchemaEntry> const& values, Catalog const& catalog, std::int64_t ranks, std::vector<RankPolicy> const& rank_policies,
                   TiedNames names_tied_to, PolicyOf policy_of, std::vector<detail::AssembledTensor> const& assembled = {}, std::vector<CatalogTensor const*> const& taken = {}) {
  Comparison result;
  Problems problems;
  // Whoever reads a tensor as it is stored has used what is decoded from it.
  std::vector<bool> used(catalog.tensors.size()), used_raw(catalog.raw.size());
  auto const number_of = [&](CatalogTensor const* tensor) { return static_cast<std::size_t>(tensor - catalog.tensors.data()); };
  auto const is_raw = [&](CatalogTensor const* tensor) { return !catalog.raw.empty() && tensor >= catalog.raw.data() && tensor < catalog.raw.data() + catalog.raw.size(); };
  auto const use = [&](CatalogTensor const* tensor) {
    auto const at = is_raw(tensor) ? used_raw.begin() + (tensor - catalog.raw.data()) : used.begin() + (tensor - catalog.tensors.data());
    bool const before = *at;
    *at = true;
    return before;
  };
  auto const find = [&](std::string const& name) -> CatalogTensor const* {
    if (auto const* tensor = catalog.find_tensor(name)) return tensor;
    return catalog.find_tensor(catalog.stored_name(name));
  };
  for (auto const* tensor : taken) use(tensor);
  auto const keep_shape = [&](EntryPolicy const& policy, WantedTensor& wanted, std::string const& name, std::string const& difference) {
    if (policy.keep_shape) {
      wanted.how = WantedTensor::How::keep;
      result.kept.push_back(name);
    } else {
      problems.add(ErrorCode::shape_mismatch, difference + " (Size mismatch)");
      problems.hint("LoadOptions::on_shape = keep leaves such tensors unchanged");
    }
  };
  auto const missing = [&](EntryPolicy const& policy, WantedTensor& wanted, TensorSpec const& tensor, std::string const& absent) {
    if (!policy.allow_missing) {
      problems.add(ErrorCode::missing_entry, tensor.name + ": Missing key in checkpoint; state wants " + detail::describe(tensor.dtype, tensor.layout.shape) + absent);
      problems.hint("LoadOptions::on_missing = keep leaves such entries unchanged");
    } else {
      wanted.how = policy.zero_missing ? WantedTensor::How::zero : WantedTensor::How::keep;
      result.missing.push_back(tensor.name);
    }
  };
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    TensorSpec const& tensor = tensors[t];
    EntryPolicy const policy = policy_of(tensor.name);
    WantedTensor& wanted = result.tensors.emplace_back();
    bool const put_together = !assembled.empty() && assembled[t].tensor != nullptr;
    if (put_together) {
      if (!assembled[t].absent.empty()) {
        missing(policy, wanted, tensor, ", and the checkpoint lacks " + assembled[t].absent);
        continue;
      }
      if (!assembled[t].fault.empty()) {
        keep_shape(policy, wanted, tensor.name, tensor.name + ": " + assembled[t].fault);
        continue;
      }
    }
    wanted.stored = put_together ? assembled[t].tensor.get() : find(tensor.name);
    for (auto const& other : names_tied_to(tensor.name)) {
      if (wanted.stored == nullptr) wanted.stored = find(other);
      if (auto const* also = find(other)) use(also);
    }
    bool const takes_floats = is_wide_float(tensor.dtype);
    bool const decodes = wanted.stored != nullptr && wanted.stored->decodes() && takes_floats;
    // A name of something stored, with its own dtype and shape or without anything decoded of that name: its bytes are meant. Floats that are scaled are
    // not, where they were stored as floats too.
    if (auto const* raw = put_together ? nullptr : catalog.find_raw(tensor.name); raw != nullptr && (wanted.stored == nullptr || (!decodes && raw->dtype == tensor.dtype && raw->shape == tensor.layout.shape))) {
      if (wanted.stored != nullptr) used[number_of(wanted.stored)] = true;
      wanted.stored = raw;
    }
    if (wanted.stored == nullptr) {
      if (catalog.find_value(tensor.name) != nullptr) {
        problems.add(ErrorCode::kind_mismatch, tensor.name + ": checkpoint has a value, state wants a tensor");
      } else {
        missing(policy, wanted, tensor, "");
      }
      continue;
    }
    wanted.shared = !put_together && use(wanted.stored) && names_tied_to(tensor.name).empty();
    CatalogTensor const& stored = *wanted.stored;
    auto const difference = [&] { return tensor.name + ": checkpoint has " + detail::describe(stored.dtype, stored.shape) + ", state wants " + detail::describe(tensor.dtype, tensor.layout.shape); };
    if (!(stored.shape == tensor.layout.shape)) {
      keep_shape(policy, wanted, tensor.name, difference());
    } else if (decodes) {
      result.decoded.push_back(tensor.name + ": " + stored.scheme() + " to " + std::string{to_string(tensor.dtype)});
    } else if (stored.dtype != tensor.dtype) {
      if (policy.cast && can_cast(stored.dtype, tensor.dtype)) result.cast.push_back(tensor.name + ": " + std::string{to_string(stored.dtype)} + " to " + std::string{to_string(tensor.dtype)});
      else problems.add(ErrorCode::dtype_mismatch, difference() + (policy.cast ? "; there is no cast between them that keeps what it should" : ""));
      problems.hint("LoadOptions::on_dtype = cast converts between floats");
    }
  }
  for (std::size_t v = 0; v < values.size(); ++v) {
    SchemaEntry const& value = values[v];
    EntryPolicy const policy = policy_of(value.name);
    WantedValue& wanted = result.values.emplace_back();
    Value const* stored = catalog.find_value(value.name);
    if (stored == nullptr) {
      if (find(value.name) != nullptr) {
        problems.add(ErrorCode::kind_mismatch, value.name + ": checkpoint has a tensor, state wants a value");
        use(find(value.name));
      } else if (!policy.allow_missing) {
        problems.add(ErrorCode::missing_entry, value.name + ": Missing key in checkpoint; state wants a value (" + std::string{to_string(value.value_kind)} + ")");
        problems.hint("LoadOptions::on_missing = keep leaves such entries unchanged");
      } else {
        result.missing.push_back(value.name);
      }
      continue;
    }
    bool const stored_per_rank = stored->kind == ValueKind::per_rank;
    if (stored_per_rank != value.per_rank) {
      problems.add(ErrorCode::kind_mismatch, value.name + (stored_per_rank ? ": checkpoint has a value per rank, state wants one for all" : ": checkpoint has one value for all ranks, state wants one per rank"));
      continue;
    }
    if (stored_per_rank && static_cast<std::int64_t>(stored->ranks.size()) != ranks && rank_policies[v] == RankPolicy::fail) {
      problems.add(ErrorCode::ranks_disagree, value.name + ": saved per rank by " + std::to_string(stored->ranks.size()) + " ranks, loaded by " + std::to_string(ranks));
      problems.hint("per_rank(x, RankPolicy::wrap) or RankPolicy::rank0 says what ranks take then");
      continue;
    }
    Value const* sample = stored_per_rank ? (stored->ranks.empty() ? nullptr : &stored->ranks.front()) : stored;
    if (sample == nullptr || sample->kind != value.value_kind) {
      problems.add(ErrorCode::kind_mismatch, value.name + ": checkpoint has " + std::string{sample == nullptr ? "nothing" : to_string(sample->kind)} + ", state wants " + std::string{to_string(value.value_kind)});
    } else if ((sample->kind == ValueKind::number || sample->kind == ValueKind::array) && sample->dtype != value.dtype) {
      Value converted;
      if (policy.cast && !stored_per_rank && sample->kind == ValueKind::number && detail::exact_number(*sample, value.dtype, converted))
        result.cast.push_back(value.name + ": " + std::string{to_string(sample->dtype)} + " to " + std::string{to_string(value.dtype)});
      else problems.add(ErrorCode::dtype_mismatch, value.name + ": checkpoint has " + to_json(*sample) + " as " + std::string{to_string(sample->dtype)} + ", state wants " + std::string{to_string(value.dtype)});
    }
    wanted.stored = stored;
  }
  auto const parts_are_used = [&](CatalogTensor const& tensor) {
    if (tensor.encoding == nullptr) return false;
    for (auto const& part : tensor.encoding->parts())
      if (auto const* raw = catalog.find_raw(part.name); raw != nullptr && used_raw[static_cast<std::size_t>(raw - catalog.raw.data())]) return true;
    return false;
  };
  for (auto const& tensor : catalog.tensors) {
    if (used[number_of(&tensor)] || parts_are_used(tensor)) continue;
    if (policy_of(tensor.name).allow_unexpected) result.unexpected.push_back(tensor.name);
    else problems.add(ErrorCode::unexpected_entry, tensor.name + ": in the checkpoint, but not in the state"), problems.hint("LoadOptions::on_unexpected = ignore leaves such entries out");
  }
  struct ByName {
    bool operator()(SchemaEntry const& entry, std::string_view other) const { return entry.name.compare(other) < 0; }
    bool operator()(std::string_view other, SchemaEntry const& entry) const { return other.compare(entry.name) < 0; }
  };
  for (auto const& [name, value] : catalog.values) {
    if (catalog.values_describe || std::binary_search(values.begin(), values.end(), name, ByName{})) continue;
    if (policy_of(name).allow_unexpected) result.unexpected.push_back(name);
    else problems.add(ErrorCode::unexpected_entry, name + ": in the checkpoint, but not in the state"), problems.hint("LoadOptions::on_unexpected = ignore leaves such entries out");
  }
  problems.raise();
  return result;
}

}  // namespace dcp

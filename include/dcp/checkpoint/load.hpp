// SPDX-License-Identifier: Apache-2.0
#pragma once
// load: a checkpoint's tensors and values into the memory of a state, on any number of ranks and in any placement.
//
//   1. agree       ranks mean the same state and options
//   2. open        rank 0 finds the checkpoint and its record; all ranks read headers, each its share
//   3. plan        every difference between state and checkpoint, in one error; the ranges that this rank needs
//   4. read        only those, by large reads, straight or over a staging buffer into the tensors
//   5. verify      chunks against their checksums, together where no rank read all of one
//                  on request, what replicas read once between them is sent to the others
//   6. finish      values, then after_load() in name order
//
// Up to the end of 3 nothing is touched. After an error in 4 or 5 the tensors of the state are unspecified on all ranks, and no
// after_load() has run; the same state can then be loaded from another checkpoint.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/agreement.hpp>
#include <dcp/checkpoint/open.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/read.hpp>
#include <dcp/checkpoint/read_plan.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/checkpoint/share_reads.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/plan/compare.hpp>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {
namespace detail {

template <class = Deferred>
EntryPolicy policy_of(LoadSettings const& settings, std::string_view name) {
  PrefixPolicy policy{"", settings.on_missing, settings.on_unexpected, settings.on_shape, settings.on_dtype};
  for (auto const& candidate : settings.for_prefix) {
    bool const matches = candidate.prefix.empty() || (name.starts_with(candidate.prefix) && (name.size() == candidate.prefix.size() || name[candidate.prefix.size()] == '.'));
    if (matches && candidate.prefix.size() >= policy.prefix.size()) policy = candidate;
  }
  return {policy.on_missing != OnMissing::error, policy.on_missing == OnMissing::zero, policy.on_unexpected == OnUnexpected::ignore, policy.on_shape == OnShape::keep, policy.on_dtype == OnDType::cast};
}

template <class = Deferred>
std::string options_text(LoadSettings const& settings) {
  auto const policy = [](PrefixPolicy const& p) {
    constexpr std::array missing{"error", "keep", "zero"};
    constexpr std::array unexpected{"error", "ignore"}, shape{"error", "keep"}, dtype{"error", "cast"};
    return std::string{"missing="} + missing[static_cast<std::size_t>(p.on_missing)] + " unexpected=" + unexpected[static_cast<std::size_t>(p.on_unexpected)] + " shape=" +
           shape[static_cast<std::size_t>(p.on_shape)] + " dtype=" + dtype[static_cast<std::size_t>(p.on_dtype)];
  };
  constexpr std::array verify{"none", "standard", "full"};
  std::string text = policy({"", settings.on_missing, settings.on_unexpected, settings.on_shape, settings.on_dtype}) + " verify=" + verify[static_cast<std::size_t>(settings.verify)];
  if (settings.read_once) text += " read_once";
  text += options_text(settings.names);
  for (auto const& p : settings.for_prefix) text += " [" + p.prefix + ": " + policy(p) + ']';
  return text;
}

template <class = Deferred>
void fill_with_zeros(TensorEntry const& tensor, std::int64_t rank, std::shared_ptr<DeviceHere const> const& device) {
  for_each_held_box(held_part(tensor.layout, rank), tensor.dtype, tensor.memory, [&](Box const& held, MemoryView const& memory) {
    Transfer const transfer = make_transfer(tensor.dtype, tensor.dtype, held, held, memory, held, 0);
    if (device != nullptr) {
      constexpr std::int64_t piece = 1 << 20;
      Bytes const zeros(static_cast<std::size_t>(bytes_of(transfer.dtype, std::min(piece, transfer.end))));
      for (std::int64_t at = 0; at < transfer.end; at += piece) unpack(device, transfer, at, std::min(transfer.end, at + piece), zeros);
      return;
    }
    transfer.for_each_run(0, transfer.end, [](std::uint64_t, std::byte* at, std::size_t bytes) { std::memset(at, 0, bytes); });
  });
}

/// Those tensors of a catalog of which a rank must look for pieces in archives, with no others than these.
template <class = Deferred>
class LocatedTensors {
 public:
  void want(CatalogTensor const& tensor, Box const& box) { wanted_[&tensor].push_back(box); }
  bool empty() const { return wanted_.empty(); }
  /// Copies of them, to be looked for.
  std::vector<CatalogTensor*> list() {
    std::vector<CatalogTensor*> result;
    for (auto const& [tensor, boxes] : wanted_) {
      CatalogTensor& mine = *copies_.try_emplace(tensor, std::make_unique<CatalogTensor>(*tensor)).first->second;
      auto const unwanted = [&of = boxes](StoredPiece const& piece) {
        Box common;
        return std::none_of(of.begin(), of.end(), [&](Box const& box) { return intersect(box, piece.box, common); });
      };
      std::erase_if(mine.pieces, unwanted);
      std::erase_if(mine.copies, unwanted);
      result.push_back(&mine);
    }
    return result;
  }
  /// The copy of `tensor`, or itself.
  CatalogTensor const* found(CatalogTensor const* tensor) const {
    auto const at = copies_.find(tensor);
    return at == copies_.end() ? tensor : at->second.get();
  }

 private:
  std::map<CatalogTensor const*, std::vector<Box>> wanted_;
  std::map<CatalogTensor const*, std::unique_ptr<CatalogTensor>> copies_;
};

template <class = Deferred>
Report load_state(CommRef comm, AnyStorage const& storage, PlaceRef const& place, StateDict const& state, LoadSettings const& settings) {
  Stopwatch watch;
  Report report;
  report.operation = "load";
  report.options = options_text(settings);
  AnyMedium& medium = *place.medium;

  watch.enter("agree");
  agree(comm, "load: agree", [&] { check_resources(settings.memory_bytes, settings.threads); });
  AgreedState const agreed = agree_state(comm, "load: agree", state, report.options + " place=" + place.path, false, settings.names, settings.on);

  return again_if_replaced(comm, medium, place.path, [&](Sighting& seen) {
    watch.enter("open");
    OpenedCheckpoint opened = open_checkpoint(comm, storage, medium, place.path, settings.verify, seen);
    Catalog const& catalog = opened.catalog;

    watch.enter("plan");
    struct Plan {
      Comparison comparison;
      std::optional<Shares> shares;   // who reads what of replicas, where they share
      ReadPlan reads;
      std::vector<AssembledTensor> assembled, unlocated;   // where names are mapped
      LocatedTensors<> located;                 // of what this rank reads, where the catalog does not know where in an archive it lies
    };
    Plan plan = agree(comm, "load: plan", [&] {
      Plan result;
      std::vector<RankPolicy> rank_policies;
      for (auto const* local : agreed.local_values) rank_policies.push_back(local == nullptr ? RankPolicy::wrap : local->value.policy);
      auto const find_stored = [&](std::string const& name) {
        CatalogTensor const* const tensor = catalog.find_tensor(catalog.stored_name(name));
        return tensor != nullptr ? tensor : catalog.find_raw(name);
      };
      std::vector<CatalogTensor const*> taken;
      if (agreed.arrangement) result.assembled = assemble_tensors(*agreed.arrangement, agreed.tensors, find_stored, [&](CatalogTensor const& tensor) { taken.push_back(&tensor); });
      result.comparison = compare(
          agreed.tensors, agreed.values, catalog, comm.size(), rank_policies,
          [&](std::string const& name) {
            std::vector<std::string> names;
            for (auto const& tie : agreed.ties)
              if (tie.kept == name) names.push_back(tie.dropped);
            return names;
          },
          [&](std::string_view name) { return policy_of(settings, name); }, result.assembled, taken);
      if (settings.read_once) result.shares.emplace(agreed.tensors, comm.size());
      result.reads.transfers.reserve(agreed.tensors.size());
      result.reads.purposes.reserve(agreed.tensors.size());
      auto const boxes_to_read = [&](std::size_t t, auto visit) {
        TensorEntry const& local = *agreed.local_tensors[t]->tensor;
        if (result.shares) for_each_shared_box(agreed.tensors[t], t, *result.shares, comm.rank(), local.memory, visit);
        else for_each_held_box(held_part(local.layout, comm.rank()), local.dtype, local.memory, visit);
      };
      auto const reads = [&](std::size_t t) { return result.comparison.tensors[t].how == WantedTensor::How::load && agreed.local_tensors[t] != nullptr; };
      auto const put_together = [&](std::size_t t) { return !result.assembled.empty() && result.assembled[t].tensor != nullptr; };
      for (std::size_t t = 0; t < agreed.tensors.size(); ++t)
        if (reads(t) && !put_together(t) && result.comparison.tensors[t].stored->lies_in_archives())
          boxes_to_read(t, [&](Box const& box, MemoryView const&) { result.located.want(*result.comparison.tensors[t].stored, box); });
      if (agreed.arrangement)
        for (auto const& form : agreed.arrangement->from) {
          if (!form.cut) continue;
          CatalogTensor const* const tensor = find_stored(form.name);
          if (tensor == nullptr || !tensor->lies_in_archives()) continue;
          for (auto const& placed : form.from)
            if (reads(placed.tensor))
              boxes_to_read(placed.tensor, [&](Box const& box, MemoryView const&) {
                Box common;
                if (intersect(box, placed.from, common)) result.located.want(*tensor, placed.placed(common));
              });
        }
      if (!result.located.empty()) {
        storage.locate(medium, opened.directory, catalog, result.located.list());
        if (agreed.arrangement) {
          auto assembled = assemble_tensors(*agreed.arrangement, agreed.tensors, [&](std::string const& name) { return result.located.found(find_stored(name)); }, [](CatalogTensor const&) {});
          std::swap(assembled, result.assembled);
          result.unlocated = std::move(assembled);   // the comparison refers to them
        }
      }
      auto const stored = [&](std::size_t t) { return put_together(t) ? result.assembled[t].tensor.get() : result.located.found(result.comparison.tensors[t].stored); };
      for (std::size_t t = 0; t < agreed.tensors.size(); ++t)
        if (reads(t))
          boxes_to_read(t, [&](Box const& box, MemoryView const& memory) {
            plan_reads(*stored(t), agreed.local_tensors[t]->tensor->dtype, box, memory, !result.comparison.tensors[t].shared, settings.verify == Verify::full, result.reads, agreed.devices.of(t));
          });
      return result;
    });

    watch.enter("read");
    std::vector<std::vector<FileRange>> loaded(catalog.files.size());
    for (auto const& wanted : plan.comparison.tensors)
      if (wanted.how == WantedTensor::How::load && !wanted.shared)
        for_each_stored_piece(*wanted.stored, [&](DType dtype, StoredPiece const& piece) {
          for_each_range_of(dtype, piece, [&](std::uint64_t begin, std::uint64_t end) { loaded[piece.file].push_back({begin, end}); });
        });
    for (auto& ranges : loaded) std::sort(ranges.begin(), ranges.end(), [](FileRange const& a, FileRange const& b) { return a.begin < b.begin; });
    Reader<> reader{comm, medium, opened, std::move(plan.reads), std::move(loaded), settings, watch};
    // Files are opened first and the record is looked at after that: if it is still the same, so is what was opened.
    agree(comm, "load: open", [&] {
      reader.open_files();
      if (!opened.record) return;
      if (still_holds(medium, opened.record_directory, opened.record_bytes)) return;
      auto const now = locate_checkpoint(medium, place.path);
      if (!now.record || now.record->id != opened.record->id) throw Error{ErrorCode::io, "the checkpoint was replaced while it was being opened"}.with_path(place.path);
    });
    agree(comm, "load: read", [&] {
      for (std::size_t t = 0; t < agreed.tensors.size(); ++t)
        if (plan.comparison.tensors[t].how == WantedTensor::How::zero && agreed.local_tensors[t] != nullptr)
          fill_with_zeros(*agreed.local_tensors[t]->tensor, comm.rank(), agreed.devices.of(t));
      try {
        reader.read();
      } catch (Error& error) {
        throw error.with_hint("the tensors of the state are unspecified now; load them again, from here or from another checkpoint");
      }
    });
    watch.enter("verify");
    reader.verify_together();
    seen.complete = true;
    if (plan.shares) {
      watch.enter("share");
      share_reads(comm, agreed, plan.comparison, *plan.shares, settings.memory_bytes, watch);
    }

    watch.enter("finish");
    agree(comm, "load: values", [&] {
      for (std::size_t v = 0; v < agreed.values.size(); ++v) {
        Value const* stored = plan.comparison.values[v].stored;
        StateEntry const* local = agreed.local_values[v];
        if (stored == nullptr || local == nullptr) continue;
        if (stored->kind == ValueKind::per_rank) {
          auto const saved = static_cast<std::int64_t>(stored->ranks.size());
          std::int64_t const take = local->value.policy == RankPolicy::rank0 && saved != comm.size() ? 0 : comm.rank() % saved;
          stored = &stored->ranks[static_cast<std::size_t>(take)];
        }
        Value converted;
        if (stored->kind == ValueKind::number && stored->dtype != local->value.ops->dtype) {
          exact_number(*stored, local->value.ops->dtype, converted);
          stored = &converted;
        }
        local->value.ops->decode(local->value.object, *stored);
      }
    });
    agree(comm, "load: after_load", [&] {
      std::vector<AfterLoad> hooks = state.hooks();
      std::stable_sort(hooks.begin(), hooks.end(), [](AfterLoad const& a, AfterLoad const& b) { return a.name < b.name; });
      for (auto const& hook : hooks) hook.call(hook.object);
    });

    report.place = opened.record ? opened.record_directory : opened.directory;
    report.id = opened.record ? opened.record->id : "";
    report.foreign = !opened.record;
    for (std::size_t t = 0; t < agreed.tensors.size(); ++t)
      if (plan.comparison.tensors[t].how == WantedTensor::How::load) {
        ++report.tensors;
        report.tensor_bytes += bytes_of(agreed.tensors[t].dtype, agreed.tensors[t].layout.shape.elements());
      }
    for (auto const& value : plan.comparison.values) report.values += value.stored != nullptr ? 1 : 0;
    report.cast = std::move(plan.comparison.cast);
    report.decoded = std::move(plan.comparison.decoded);
    report.missing = std::move(plan.comparison.missing);
    report.unexpected = std::move(plan.comparison.unexpected);
    report.kept = std::move(plan.comparison.kept);
    report.duplicates = catalog.duplicates;
    report.warnings = catalog.warnings;
    agreed.devices.warn(report.warnings);
    struct Counts {
      std::uint64_t verified, unverified, verification, over_read;
    };
    for (auto const& rank : all_gather_value(comm, Counts{reader.verified_bytes, reader.unverified_bytes, reader.verification_bytes + opened.verification_bytes, reader.over_read_bytes})) {
      report.verified_bytes += rank.verified;
      report.unverified_bytes += rank.unverified;
      report.verification_bytes += rank.verification;
      report.over_read_bytes += rank.over_read;
    }
    watch.collect(comm, report);
    return report;
  });
}

}  // namespace detail

/// Fills `state` from the checkpoint at `place`. Collective: every rank of `comm` calls it with the same place, names and options.
///
/// In place  tensors and values are written where they are; nothing is replaced or resized but strings, vectors and JSON
/// Any mesh  each rank reads what its own placement needs, whatever mesh wrote the checkpoint; with read_once, replicas share the reading
/// Strict    missing, unexpected and mismatched entries are one Error that lists them all, before any memory is touched; LoadOptions
///           has a policy for each, and the report says what it did
/// Throws    the same Error on all ranks if any rank failed
/// Example   auto report = dcp::load<dcp::SafeTensors>(world, "ckpt", {{"model", model}, {"step", step}});
template <class S, class C>
Report load(C& comm, place_of<S> const& place, StateDict const& state, LoadOptions<S> const& options = {}) {
  [[maybe_unused]] detail::verb_arguments<S, C> check;
  if constexpr (Storage<S> && Communicator<C>) {
    return detail::load_state(CommRef{comm}, *S::open(options.storage), S::locate(place), state, detail::settings_of(options));
  } else {
    return {};
  }
}

}  // namespace dcp

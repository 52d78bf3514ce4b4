// SPDX-License-Identifier: Apache-2.0
#pragma once
// Upstream's reshard rows: arange(16) as 4 x 4 is saved in one layout and loaded in another.

#include "support/held_tensor.hpp"

#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp::test {

using RR = Placement<Replicate, Replicate>;
using RS = Placement<Replicate, Shard<0>>;
using SR = Placement<Shard<0>, Replicate>;
using SS = Placement<Shard<0>, Shard<0>>;
using R1 = Placement<Replicate>;
using S1 = Placement<Shard<0>>;

/// Placements as a list that can be walked.
template <class... P>
struct Placements {
  template <class Visit>
  static void each(Visit visit) {
    (visit(std::type_identity<P>{}), ...);
  }
};
/// Upstream's, in its order.
using OneDPlacements = Placements<S1, R1>;
using TwoDPlacements = Placements<RR, RS, SR, SS>;

/// A tensor in whole on every rank, by dcp::reshard into a plain tensor: upstream's "replicated view". Collective.
template <class T, class P, class C>
std::vector<T> replicated_view(C& world, Held<T, P>& held) {
  std::vector<T> whole(static_cast<std::size_t>(held.tensor.shape().elements()));
  TensorView<T> view{whole, held.tensor.shape()};
  dcp::reshard(world, {{"dtensor", held.tensor}}, {{"dtensor", view}});
  return whole;
}

/// The data files at a place, sorted.
inline std::vector<std::string> data_files(std::string const& place) {
  std::vector<std::string> names;
  for (auto const& entry : std::filesystem::directory_iterator{place})
    if (entry.path().extension() == ".safetensors") names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

/// What the steps of a row do with a tensor, whatever its placement.
struct Part {
  StateDict state;
  Layout layout;
  std::vector<float>* memory;

  template <class P>
  explicit Part(Held<float, P>& held) : state{{"dtensor", held.tensor}}, layout{held.tensor.layout()}, memory{&held.memory} {}
};
template <class S, class C>
void reshard_steps(C& world, std::string const& place, typename S::Options const& storage, Part const& saved, Part const& loaded, Part const& back) {
  auto const values = arange(16);
  for (auto const* part : {&loaded, &back}) std::fill(part->memory->begin(), part->memory->end(), -1.0f);
  dcp::save<S>(world, place, saved.state, {.if_exists = IfExists::replace, .storage = storage});
  auto const report = dcp::load<S>(world, place, loaded.state);
  CHECK(report.duplicates.empty());   // nothing of what was at the place before is left
  CHECK(report.unverified_bytes == 0);

  std::vector<float> replicated(16);
  TensorView<float> view{replicated, {4, 4}};
  dcp::reshard(world, loaded.state, {{"dtensor", view}});
  CHECK(replicated == values);
  CHECK(assembled<float>(loaded.layout, all_gather_bytes(world, std::as_bytes(std::span{*loaded.memory}))) == values);

  dcp::reshard(world, loaded.state, back.state);
  CHECK(*back.memory == *saved.memory);
}

/// One step of upstream's reshard rows: `place` is reused, an earlier checkpoint there is replaced. Beside the sharded layout of safetensors in PyTorch's own format,
/// as upstream's test_dtensor_resharding.py does.
template <class From, class To, int N, int M, class C>
void reshard_through(C& world, std::string const& place, DeviceMesh<N> const& saving, DeviceMesh<M> const& loading, FileLayout layout) {
  Held<float, From> saved{saving, {4, 4}}, back{saving, {4, 4}};
  saved.fill(arange(16));
  Held<float, To> loaded{loading, {4, 4}};
  reshard_steps<SafeTensors>(world, place, {.layout = layout}, Part{saved}, Part{loaded}, Part{back});
  if (layout == FileLayout::sharded) reshard_steps<TorchDcp>(world, place + "_torch_dcp", {}, Part{saved}, Part{loaded}, Part{back});
}

/// Every file layout in a directory of its own, reused for all pairs of a row.
template <class Visit>
void in_each_layout(std::string const& directory, Visit visit) {
  visit(directory + "/sharded", FileLayout::sharded);
  visit(directory + "/final", FileLayout::final);
}

template <class C>
DeviceMesh<1> mesh_1d(C const& world) {
  return {world, {world.size()}};
}
template <class C>
DeviceMesh<2> mesh_2d(C const& world) {
  return {world, {2, world.size() / 2}};
}

template <class C>
void reshard_1d_to_1d(C& world, std::string const& directory) {
  auto const mesh = mesh_1d(world);
  in_each_layout(directory, [&](std::string const& place, FileLayout layout) {
    reshard_through<R1, S1>(world, place, mesh, mesh, layout);
    reshard_through<S1, R1>(world, place, mesh, mesh, layout);
  });
}
template <class C>
void reshard_2d_to_2d(C& world, std::string const& directory) {
  auto const mesh = mesh_2d(world);
  in_each_layout(directory, [&](std::string const& place, FileLayout layout) {
    int pairs = 0;
    TwoDPlacements::each([&]<class From>(std::type_identity<From>) {
      TwoDPlacements::each([&]<class To>(std::type_identity<To>) {
        if constexpr (!std::is_same_v<From, To>) reshard_through<From, To>(world, place, mesh, mesh, layout), ++pairs;
      });
    });
    CHECK(pairs == 12);
  });
}
template <class C>
void reshard_1d_to_2d(C& world, std::string const& directory) {
  in_each_layout(directory, [&](std::string const& place, FileLayout layout) {
    OneDPlacements::each([&]<class From>(std::type_identity<From>) {
      TwoDPlacements::each([&]<class To>(std::type_identity<To>) { reshard_through<From, To>(world, place, mesh_1d(world), mesh_2d(world), layout); });
    });
  });
}
template <class C>
void reshard_2d_to_1d(C& world, std::string const& directory) {
  in_each_layout(directory, [&](std::string const& place, FileLayout layout) {
    TwoDPlacements::each([&]<class From>(std::type_identity<From>) {
      OneDPlacements::each([&]<class To>(std::type_identity<To>) { reshard_through<From, To>(world, place, mesh_2d(world), mesh_1d(world), layout); });
    });
  });
}
/// [1] over all ranks, and back on a 2-D mesh whose axes both split it.
template <class C>
void reshard_empty_shards(C& world, std::string const& directory) {
  in_each_layout(directory, [&](std::string const& place, FileLayout layout) {
    Held<float, S1> saved{mesh_1d(world), {1}};
    CHECK(saved.memory.size() == (world.rank() == 0 ? 1u : 0u));
    saved.fill({0.625f});
    auto const load_and_compare = [&]<class S>(std::type_identity<S>, std::string const& from) {
      Held<float, SS> loaded{mesh_2d(world), {1}};
      dcp::load<S>(world, from, {{"dtensor", loaded.tensor}});
      CHECK(loaded.memory == (world.rank() == 0 ? std::vector<float>{0.625f} : std::vector<float>{}));
      CHECK(replicated_view(world, loaded) == std::vector<float>{0.625f});
      CHECK(gathered(world, loaded) == std::vector<float>{0.625f});
    };
    dcp::save<SafeTensors>(world, place, {{"dtensor", saved.tensor}}, {.storage = {.layout = layout}});
    load_and_compare(std::type_identity<SafeTensors>{}, place);
    if (layout == FileLayout::sharded) {
      dcp::save<TorchDcp>(world, place + "_torch_dcp", {{"dtensor", saved.tensor}});
      load_and_compare(std::type_identity<TorchDcp>{}, place + "_torch_dcp");
    }
  });
}

}  // namespace dcp::test

// SPDX-License-Identifier: Apache-2.0
// Optimizer state in flat buffers, as ZeRO and Megatron hold it: one checkpoint for any way to hold it.
#include <dcp/checkpoint/flat_ranges.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

namespace {

using dcp::Extents;
using dcp::FlatBucket;
using dcp::FlatRange;
using dcp::Placement;
using Storage = dcp::BasicSafeTensors<dcp::Memory>;

// The parameters of a small model: odd sizes, so that shards begin and end inside rows.
std::vector<std::pair<std::string, Extents>> const parameters{{"embed", {50, 7}}, {"up", {24, 6}}, {"norm", {6}}, {"down", {6, 24}}, {"scale", {}}};

// The value of element `at` of a tensor, of a moment.
float value_of(std::string const& name, std::int64_t at) { return static_cast<float>(name.size() * 10000 + static_cast<unsigned char>(name[0])) + static_cast<float>(at); }

/// Adam's moments, each in a flat buffer of its own. `FirstLast`: in which order the buffer is filled.
template <class P>
struct Moments {
  std::vector<float> exp_avg, exp_avg_sq;
  std::vector<dcp::ShardedTensor<float, P>> first, second;

  template <int N>
  Moments(dcp::DeviceMesh<N> const& mesh, std::vector<std::size_t> const& order, std::int64_t alignment, std::int64_t multiple, int flat_axis) {
    std::vector<Extents> shapes;
    for (auto const i : order) shapes.push_back(parameters[i].second);
    FlatBucket const bucket{shapes, alignment, mesh.geometry().extents[static_cast<std::size_t>(flat_axis)], multiple};
    hold(mesh, bucket, order, bucket.shard_elements());
  }
  template <int N>
  Moments(dcp::DeviceMesh<N> const& mesh, FlatBucket const& bucket, std::vector<std::size_t> const& order, std::int64_t elements) { hold(mesh, bucket, order, elements); }
  Moments(Moments const&) = delete;

  template <int N>
  void hold(dcp::DeviceMesh<N> const& mesh, FlatBucket const& bucket, std::vector<std::size_t> const& order, std::int64_t elements) {
    exp_avg.assign(static_cast<std::size_t>(elements), -1.0f);
    exp_avg_sq = exp_avg;
    first.resize(parameters.size(), {mesh, Extents{0}, exp_avg});
    second = first;
    for (std::size_t slot = 0; slot < order.size(); ++slot) {
      first[order[slot]] = {mesh, parameters[order[slot]].second, bucket[slot], exp_avg};
      second[order[slot]] = {mesh, parameters[order[slot]].second, bucket[slot], exp_avg_sq};
    }
  }
  dcp::StateDict state() {
    dcp::StateDict all;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      all.add("exp_avg." + parameters[i].first, first[i]);
      all.add("exp_avg_sq." + parameters[i].first, second[i]);
    }
    return all;
  }
  void visit(auto each) {   // each(element of memory, the value that it should have)
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      auto const part = first[i].local_part();
      for (std::int64_t e = part.begin; e < part.end; ++e) {
        each(first[i].data()[e - part.begin], value_of(parameters[i].first, e));
        each(second[i].data()[e - part.begin], -value_of(parameters[i].first, e));
      }
    }
  }
};

template <class P>
bool holds_all(Moments<P>& moments) {
  bool right = true;
  moments.visit([&](float& element, float wanted) { right = right && element == wanted; });
  return right;
}

}  // namespace

TEST_CASE("flat: moments saved by ZeRO on four ranks go on under ZeRO on three, in another order, under Megatron over copies, split by rows, and whole") {
  for (auto const layout : {dcp::FileLayout::final, dcp::FileLayout::sharded}) {
    dcp::Memory store;
    using Flat = Placement<dcp::FlatShard>;
    dcp::run_threads(4, [&](dcp::ThreadComm& world) {
      dcp::DeviceMesh<1> const mesh{world, {4}};
      Moments<Flat> zero{mesh, {0, 1, 2, 3, 4}, 1, 8, 0};
      zero.visit([](float& element, float wanted) { element = wanted; });
      auto const report = dcp::save<Storage>(world, {store, "ckpt"}, zero.state(), {.storage = {.layout = layout}});
      CHECK(report.tensors == 10);
    });
    dcp::run_threads(3, [&](dcp::ThreadComm& world) {
      dcp::DeviceMesh<1> const mesh{world, {3}};
      Moments<Flat> zero{mesh, {4, 2, 0, 3, 1}, 1, 0, 0};
      dcp::load<Storage>(world, {store, "ckpt"}, zero.state());
      CHECK(holds_all(zero));
      // What lies between tensors, and behind them, is nobody's.
      CHECK(std::count(zero.exp_avg.begin(), zero.exp_avg.end(), -1.0f) == (world.rank() == 2 ? 3 * zero.first[0].layout().flat.shard - 645 : 0));
    });
    dcp::run_threads(6, [&](dcp::ThreadComm& world) {
      dcp::DeviceMesh<2> const mesh{world, {2, 3}};
      Moments<Placement<dcp::Replicate, dcp::FlatShard>> megatron{mesh, {4, 3, 2, 1, 0}, 64, 128, 1};
      dcp::load<Storage>(world, {store, "ckpt"}, megatron.state());
      CHECK(holds_all(megatron));
      // And back, by ranks that hold copies: each element is written once.
      dcp::save<Storage>(world, {store, "again"}, megatron.state(), {.storage = {.layout = layout}});
    });
    for (std::string const place : {"ckpt", "again"}) {
      dcp::SelfComm self;
      std::vector<float> down(6 * 24), scale(1);
      dcp::load<Storage>(self, {store, place}, {{"exp_avg.down", dcp::TensorView<float>{down, {6, 24}}}, {"exp_avg.scale", dcp::TensorView<float>{scale, Extents{}}}}, {.on_unexpected = dcp::OnUnexpected::ignore});
      for (std::size_t i = 0; i < down.size(); ++i) CHECK(down[i] == value_of("down", static_cast<std::int64_t>(i)));
      CHECK(scale[0] == value_of("scale", 0));
      dcp::run_threads(3, [&](dcp::ThreadComm& world) {
        std::vector<float> columns(6 * 8);
        dcp::ShardedTensor<float, Placement<dcp::Shard<1>>> part{dcp::DeviceMesh<1>{world, {3}}, {6, 24}, columns};
        dcp::load<Storage>(world, {store, place}, {{"exp_avg_sq.down", part}}, {.on_unexpected = dcp::OnUnexpected::ignore});
        for (std::size_t i = 0; i < columns.size(); ++i)
          CHECK(columns[i] == -value_of("down", static_cast<std::int64_t>(i / 8 * 24 + i % 8) + world.rank() * 8));
      });
    }
  }
}

TEST_CASE("flat: the bytes of a final layout do not depend on how moments were held") {
  auto const files_of = [](auto save) {
    dcp::Memory store;
    save(store);
    std::map<std::string, dcp::Bytes> files;
    dcp::MediumModel<dcp::Memory> medium{store};
    for (auto const& entry : medium.list("ckpt"))
      if (entry.name != dcp::record_name) files[entry.name] = dcp::read_file(medium, "ckpt/" + entry.name, 1u << 30);
    return files;
  };
  auto const by_zero = files_of([](dcp::Memory& store) {
    dcp::run_threads(5, [&](dcp::ThreadComm& world) {
      Moments<Placement<dcp::FlatShard>> zero{dcp::DeviceMesh<1>{world, {5}}, {0, 1, 2, 3, 4}, 1, 10, 0};
      zero.visit([](float& element, float wanted) { element = wanted; });
      dcp::save<Storage>(world, {store, "ckpt"}, zero.state());
    });
  });
  auto const by_one = files_of([](dcp::Memory& store) {
    dcp::SelfComm self;
    Moments<Placement<dcp::FlatShard>> all{dcp::DeviceMesh<1>{self, {1}}, {2, 0, 1, 4, 3}, 16, 0, 0};
    all.visit([](float& element, float wanted) { element = wanted; });
    dcp::save<Storage>(self, {store, "ckpt"}, all.state());
  });
  CHECK(by_zero.contains("model-00001-of-00001.safetensors"));
  CHECK(by_zero == by_one);
}

TEST_CASE("flat: a live state moves from flat shards to rows over tensor parallelism, and back") {
  dcp::run_threads(4, [](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> const line{world, {4}};
    dcp::DeviceMesh<2> const grid{world, {2, 2}};
    FlatBucket const bucket{{{9, 5}, {8, 3}}, 4, 4}, halves{{{10, 5}, {8, 3}}, 1, 2};
    std::vector<std::int64_t> flat(static_cast<std::size_t>(bucket.shard_elements()), -1), pairs(static_cast<std::size_t>(halves.shard_elements()), -1), again = flat;
    using Flat = dcp::ShardedTensor<std::int64_t, Placement<dcp::FlatShard>>;
    using Pairs = dcp::ShardedTensor<std::int64_t, Placement<dcp::FlatShard, dcp::Shard<0>>>;
    Flat a{line, {9, 5}, bucket[0], flat}, b{line, {8, 3}, bucket[1], flat}, a2{line, {9, 5}, bucket[0], again}, b2{line, {8, 3}, bucket[1], again};
    for (auto* tensor : {&a, &b})
      for (std::int64_t e = tensor->local_part().begin; e < tensor->local_part().end; ++e) tensor->data()[e - tensor->local_part().begin] = e + (tensor == &a ? 0 : 100);
    // Rows padded to an even number over tensor parallelism: 20 x 5 of which 9 x 5 are real.
    Pairs c{grid, dcp::Padded{{9, 5}, {20, 5}}, halves[0], pairs};
    std::vector<std::int64_t> rows(3 * 4 * 2);
    dcp::ShardedTensor<std::int64_t, Placement<dcp::Replicate, dcp::Shard<1>>> d{grid, {8, 3}, rows};
    dcp::reshard(world, {{"a", a}, {"b", b}}, {{"a", c}, {"b", d}});
    std::int64_t const first_row = world.rank() % 2 * 10;
    for (std::int64_t e = c.local_part().begin; e < c.local_part().end; ++e) CHECK(c.data()[e - c.local_part().begin] == first_row * 5 + e);
    dcp::reshard(world, {{"a", c}, {"b", d}}, {{"a", a2}, {"b", b2}});
    CHECK(again == flat);
  });
}

TEST_CASE("flat: ranges that only ranks know are exchanged once, and what does not fit is the same Error on all ranks") {
  std::vector<Extents> shapes;
  for (auto const& [name, shape] : parameters) shapes.push_back(shape);
  std::int64_t const total = 645;
  std::vector<FlatRange> const cuts{{300, 301}, {301, 645}, {0, 300}, {9, 9}};
  dcp::Memory store;
  dcp::run_threads(4, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> const mesh{world, {4}};
    FlatRange const mine = cuts[static_cast<std::size_t>(world.rank())];
    FlatBucket const bucket = dcp::exchange_flat_ranges(world, mesh, 0, shapes, 1, mine);
    CHECK(bucket.elements() == total);
    Moments<Placement<dcp::FlatShard>> moments{mesh, bucket, {0, 1, 2, 3, 4}, mine.size()};
    moments.visit([](float& element, float wanted) { element = wanted; });
    dcp::save<Storage>(world, {store, "ckpt"}, moments.state());
  });
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    Moments<Placement<dcp::FlatShard>> zero{dcp::DeviceMesh<1>{world, {2}}, {0, 1, 2, 3, 4}, 1, 0, 0};
    dcp::load<Storage>(world, {store, "ckpt"}, zero.state());
    CHECK(holds_all(zero));
  });
  struct Mistake {
    FlatRange of_rank_3;
    std::int64_t alignment;
    std::string sentence;
  };
  for (auto const& mistake : {Mistake{{644, 645}, 1, "ranks 1 and 3 of the axis both hold element 644"}, Mistake{{0, 0}, 2, "were given different shapes, alignment or mesh"}}) {
    std::mutex mutex;
    std::vector<std::string> sentences;
    dcp::run_threads(4, [&](dcp::ThreadComm& world) {
      try {
        bool const last = world.rank() == 3;
        dcp::exchange_flat_ranges(world, dcp::DeviceMesh<1>{world, {4}}, 0, shapes, last ? mistake.alignment : 1, last ? mistake.of_rank_3 : cuts[static_cast<std::size_t>(world.rank())]);
      } catch (dcp::Error const& error) {
        std::lock_guard const lock{mutex};
        sentences.push_back(error.message());
      }
    });
    CHECK(sentences.size() == 4);
    for (auto const& sentence : sentences) CHECK_MESSAGE(sentence.find(mistake.sentence) != std::string::npos, sentence);
  }
  // Copies along another axis hold the same, or are told.
  CHECK_THROWS_WITH_AS(dcp::run_threads(4, [&](dcp::ThreadComm& world) {
                         auto const at = static_cast<std::int64_t>(world.rank() % 2);
                         dcp::exchange_flat_ranges(world, dcp::DeviceMesh<2>{world, {2, 2}}, 1, shapes, 1, {at * 300, world.rank() == 3 ? 640 : at == 0 ? 300 : 645});
                       }),
                       doctest::Contains("rank 1 and rank 3 are copies of each other along the other axes"), dcp::Error);
}

// SPDX-License-Identifier: Apache-2.0
// Names mapped: a state and a checkpoint that has it under other names, cut, joined, transposed.
#include <dcp/checkpoint/convert.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include <doctest/doctest.h>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/outcome.hpp"
#include "support/random_parts.hpp"

#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

namespace {

using dcp::test::Generator, dcp::test::Subject;
using Files = dcp::BasicSafeTensors<dcp::Memory>;
using Torch = dcp::BasicTorchDcp<dcp::Memory>;

// A whole tensor in row-major order, and what the rules say of one, element by element.
struct Array {
  dcp::DType dtype{};
  dcp::Extents shape;
  dcp::Bytes bytes{};

  std::size_t each() const { return static_cast<std::size_t>(dcp::bits_of(dtype)) / 8; }
  static Array random(dcp::DType dtype, dcp::Extents const& shape, dcp::test::Random& random) {
    Array array{dtype, shape, {}};
    array.bytes = random.bytes(static_cast<std::size_t>(shape.elements()) * array.each());
    if (dtype == dcp::DType::boolean)
      for (auto& byte : array.bytes) byte &= std::byte{1};
    return array;
  }
  std::byte* at(dcp::Extents const& index) {
    std::int64_t element = 0;
    for (int d = 0; d < shape.rank(); ++d) element = element * shape[d] + index[d];
    return bytes.data() + static_cast<std::size_t>(element) * each();
  }
  // Elements [begin, begin + size) along dim.
  Array slice(int dim, std::int64_t begin, std::int64_t size) {
    Array part{dtype, shape, {}};
    part.shape[dim] = size;
    part.bytes.resize(static_cast<std::size_t>(part.shape.elements()) * each());
    dcp::for_each_index(dcp::Box::whole(part.shape), part.shape.rank(), [&](dcp::Extents const& index) {
      dcp::Extents from = index;
      from[dim] += begin;
      std::copy_n(at(from), each(), part.at(index));
    });
    return part;
  }
  Array transposed(std::vector<int> const& order) {   // dimension d of this is dimension order[d] of the result
    Array other{dtype, shape, dcp::Bytes(bytes.size())};
    for (std::size_t d = 0; d < order.size(); ++d) other.shape[order[d]] = shape[static_cast<int>(d)];
    dcp::for_each_index(dcp::Box::whole(shape), shape.rank(), [&](dcp::Extents const& index) {
      dcp::Extents to = index;
      for (std::size_t d = 0; d < order.size(); ++d) to[order[d]] = index[static_cast<int>(d)];
      std::copy_n(at(index), each(), other.at(to));
    });
    return other;
  }
};
Array joined(std::vector<Array> parts, int dim) {
  Array all{parts[0].dtype, parts[0].shape, {}};
  all.shape[dim] = 0;
  for (auto const& part : parts) all.shape[dim] += part.shape[dim];
  all.bytes.resize(static_cast<std::size_t>(all.shape.elements()) * all.each());
  std::int64_t at = 0;
  for (auto& part : parts) {
    dcp::for_each_index(dcp::Box::whole(part.shape), part.shape.rank(), [&](dcp::Extents const& index) {
      dcp::Extents to = index;
      to[dim] += at;
      std::copy_n(part.at(index), part.each(), all.at(to));
    });
    at += part.shape[dim];
  }
  return all;
}

using Arrays = std::map<std::string, Array>;

// A state, the rules, and what a checkpoint has of it by them.
struct Case {
  Arrays state, stored;
  dcp::NameMap names;
};

Case random_case(Generator& generator, std::uint64_t seed) {
  dcp::test::Random random{seed};
  std::vector<dcp::DType> const dtypes{dcp::DType::f32, dcp::DType::bf16, dcp::DType::u8, dcp::DType::i64, dcp::DType::boolean, dcp::DType::c64};
  std::vector<std::int64_t> const sizes{1, 2, 3, 5, 8, 13, 40};
  Case made;
  made.names.drop("module.");
  for (std::int64_t block = 0, count = 1 + generator.up_to(5); block < count; ++block) {
    std::string const at = "layers." + std::to_string(block), here = "module." + at, to = "model." + at;
    dcp::DType const dtype = generator.pick(dtypes);
    int const rank = static_cast<int>(1 + generator.up_to(2));
    dcp::Extents shape = dcp::Extents::filled(rank, 1);
    for (int d = 0; d < rank; ++d) shape[d] = generator.pick(sizes);
    int const dim = static_cast<int>(generator.up_to(rank - 1));
    auto const of_size = [&](std::int64_t size) {
      dcp::Extents part = shape;
      part[dim] = size;
      return Array::random(dtype, part, random);
    };
    switch (generator.up_to(6)) {
      case 0: {   // another name
        Array const array = of_size(shape[dim]);
        made.state.emplace(here + ".norm", array), made.stored.emplace(to + ".layernorm", array);
        made.names.rename(at + ".norm", to + ".layernorm");
        break;
      }
      case 1: {   // fused in the state, of different sizes
        Array q = of_size(generator.pick(sizes)), k = of_size(generator.pick(sizes)), v = of_size(generator.pick(sizes));
        made.state.emplace(here + ".qkv", joined({q, k, v}, dim));
        made.stored.emplace(to + ".q", q), made.stored.emplace(to + ".k", k), made.stored.emplace(to + ".v", v);
        made.names.concat(at + ".qkv", {{to + ".q", q.shape[dim]}, {to + ".k", k.shape[dim]}, to + ".v"}, dim);
        break;
      }
      case 2: {   // fused in the checkpoint
        Array gate = of_size(generator.pick(sizes)), up = of_size(generator.pick(sizes));
        made.stored.emplace(to + ".gate_up", joined({gate, up}, dim));
        made.state.emplace(here + ".gate", gate), made.state.emplace(here + ".up", up);
        made.names.split({at + ".gate", at + ".up"}, to + ".gate_up", dim);
        break;
      }
      case 3: {   // transposed, perhaps cut as well
        Array array = of_size(shape[dim]);
        std::vector<int> order(static_cast<std::size_t>(rank));
        std::iota(order.begin(), order.end(), 0);
        random.shuffle(order);
        made.state.emplace(here + ".conv", array);
        made.names.transpose(at + ".conv", to + ".conv", order);
        Array other = array.transposed(order);
        if (other.shape[0] % 2 != 0) {
          made.stored.emplace(to + ".conv", other);
          break;
        }
        std::int64_t const half = other.shape[0] / 2;
        made.stored.emplace(to + ".first", other.slice(0, 0, half)), made.stored.emplace(to + ".second", other.slice(0, half, half));
        made.names.concat(to + ".conv", {to + ".first", to + ".second"});
        break;
      }
      case 4: {   // group by group: q of two heads, k, v, for each
        std::int64_t const groups = 1 + generator.up_to(3), head = 1 + generator.up_to(4);
        Array q = of_size(groups * 2 * head), k = of_size(groups * head), v = of_size(groups * head);
        std::vector<dcp::NameMap::Slice> slices;
        std::vector<Array> parts;
        for (std::int64_t g = 0; g < groups; ++g) {
          slices.emplace_back(to + ".q", g * 2 * head, 2 * head), slices.emplace_back(to + ".k", g * head, head), slices.emplace_back(to + ".v", g * head, head);
          parts.push_back(q.slice(dim, g * 2 * head, 2 * head)), parts.push_back(k.slice(dim, g * head, head)), parts.push_back(v.slice(dim, g * head, head));
        }
        made.state.emplace(here + ".attention", joined(parts, dim));
        made.stored.emplace(to + ".q", q), made.stored.emplace(to + ".k", k), made.stored.emplace(to + ".v", v);
        made.names.concat(at + ".attention", slices, dim);
        break;
      }
      case 5: {   // parts there, other parts here
        Array one = of_size(4), two = of_size(2);
        made.state.emplace(here + ".one", one), made.state.emplace(here + ".two", two);
        Array all = joined({one, two}, dim);
        made.stored.emplace(to + ".a", all.slice(dim, 0, 3)), made.stored.emplace(to + ".b", all.slice(dim, 3, 3));
        made.names.split({at + ".one", at + ".two"}, at + ".all", dim).concat(at + ".all", {to + ".a", to + ".b"}, dim);
        break;
      }
      default: {
        Array const array = of_size(shape[dim]);
        made.state.emplace(here + ".other", array), made.stored.emplace(at + ".other", array);
        break;
      }
    }
  }
  return made;
}

std::vector<Subject> subjects_of(Arrays const& arrays) {
  std::vector<Subject> subjects;
  for (auto const& [name, array] : arrays) subjects.push_back({name, array.dtype, array.shape});
  return subjects;
}
std::vector<dcp::Layout> layouts_of(Generator& generator, std::vector<Subject> const& subjects, int ranks) {
  std::vector<dcp::Layout> layouts;
  for (auto const& subject : subjects) layouts.push_back(generator.layout(subject.shape, ranks, subject.dtype));
  return layouts;
}

template <class S>
void save_arrays(Generator& generator, dcp::Memory const& store, std::string const& place, Arrays const& arrays, dcp::SaveOptions<S> const& options) {
  auto const subjects = subjects_of(arrays);
  int const ranks = static_cast<int>(1 + generator.up_to(4));
  CAPTURE(ranks);
  auto const layouts = layouts_of(generator, subjects, ranks);
  auto const pitch = static_cast<std::uint64_t>(generator.up_to(1));
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    dcp::StateDict state;
    auto held = dcp::test::hold(subjects, layouts, world.rank(), pitch, state);
    for (auto& part : held) part.visit([&](std::byte& byte, std::uint64_t at) { byte = arrays.at(part.subject->name).bytes[at]; });
    dcp::save<S>(world, {store, place}, state, options);
  });
}
// The first difference, or nothing.
template <class S>
std::string load_arrays(Generator& generator, dcp::Memory const& store, std::string const& place, Arrays const& arrays, dcp::LoadOptions<S> const& options) {
  auto const subjects = subjects_of(arrays);
  int const ranks = static_cast<int>(1 + generator.up_to(4));
  CAPTURE(ranks);
  auto const layouts = layouts_of(generator, subjects, ranks);
  std::mutex mutex;
  std::string wrong;
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    dcp::StateDict state;
    auto held = dcp::test::hold(subjects, layouts, world.rank(), 0, state);
    auto const report = dcp::load<S>(world, {store, place}, state, options);
    std::lock_guard const lock{mutex};
    for (auto& part : held)
      part.visit([&](std::byte& byte, std::uint64_t at) {
        if (byte != arrays.at(part.subject->name).bytes[at]) wrong = part.subject->name + " at byte " + std::to_string(at);
      });
    if (report.unverified_bytes != 0) wrong = "unverified bytes: " + std::to_string(report.unverified_bytes);
  });
  return wrong;
}

template <class S>
void check_law(char const* storage, typename S::Options const& options, int rounds) {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < rounds; ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    CAPTURE(storage);
    Generator generator{seed};
    Case const made = random_case(generator, seed);
    dcp::Memory store;
    dcp::SaveOptions<S> save;
    save.storage = options;
    save_arrays<S>(generator, store, "plain", made.stored, save);
    save.names = made.names;
    save.writers_per_file = generator.chance(25) ? 1 + generator.up_to(2) : 16;
    save_arrays<S>(generator, store, "mapped", made.state, save);
    dcp::LoadOptions<S> load;
    load.storage = options;
    load.verify = generator.chance(30) ? dcp::Verify::full : dcp::Verify::standard;
    REQUIRE(load_arrays<S>(generator, store, "mapped", made.stored, load) == "");
    load.names = made.names;
    load.read_once = generator.chance(30);
    REQUIRE(load_arrays<S>(generator, store, "plain", made.state, load) == "");
    REQUIRE(load_arrays<S>(generator, store, "mapped", made.state, load) == "");
  }
}

std::vector<float> numbers(std::size_t count, float first) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), first);
  return values;
}
void add(dcp::StateDict& state, std::string const& name, dcp::Extents const& shape, std::vector<float>& values) {
  state.add_tensor(name, dcp::DType::f32, dcp::plain_layout(shape), {reinterpret_cast<std::byte*>(values.data()), dcp::row_major_strides(shape)});
}
}  // namespace

TEST_CASE("law: what is saved with names is what the rules say, on any mesh and placement, and loads back with them, bit for bit") {
  int const rounds = dcp::test::rounds(40, 2000);
  check_law<Files>("safetensors", {}, rounds);
  check_law<Files>("safetensors, sharded", {.layout = dcp::FileLayout::sharded}, rounds);
  check_law<Torch>("torch", {}, rounds);
}

TEST_CASE("a transformer with fused QKV and gate-up weights, wrapped by DDP and compile, is saved as transformers has it and loaded back") {
  constexpr std::int64_t hidden = 8, q_rows = 8, kv_rows = 4, inner = 6;
  dcp::NameMap names;
  names.drop("module.").drop("_orig_mod.").rename_prefix("blocks.", "model.layers.").rename("head.weight", "lm_head.weight").rename_prefix("trainer.", "")
      .concat("model.layers.*.attention.qkv.weight", {{"model.layers.*.self_attn.q_proj.weight", q_rows}, {"model.layers.*.self_attn.k_proj.weight", kv_rows}, {"model.layers.*.self_attn.v_proj.weight", kv_rows}})
      .concat("model.layers.*.mlp.gate_up.weight", {"model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"});
  dcp::SelfComm self;
  dcp::Memory store;
  auto qkv = numbers((q_rows + 2 * kv_rows) * hidden, 0), gate_up = numbers(2 * inner * hidden, 1000), head = numbers(hidden, 2000);
  std::int64_t step = 7;
  auto const model = [&](std::vector<float>& a, std::vector<float>& b, std::vector<float>& c, std::int64_t& d) {
    dcp::StateDict state;
    add(state, "module.blocks.0._orig_mod.attention.qkv.weight", {q_rows + 2 * kv_rows, hidden}, a);
    add(state, "module.blocks.0._orig_mod.mlp.gate_up.weight", {2 * inner, hidden}, b);
    add(state, "module.head.weight", {hidden}, c);
    state.add("trainer.step", d);
    return state;
  };
  dcp::save<Files>(self, {store, "model"}, model(qkv, gate_up, head, step), {.names = names});

  auto const stored = dcp::load_from_keys<Files>(self, {store, "model"});
  REQUIRE(stored.tensors().size() == 6);
  auto const starts_with = [&](char const* name, float first, dcp::Extents const& shape) {
    auto const& tensor = stored.tensors().at(name);
    CHECK(tensor.shape() == shape);
    float value = -1;
    std::memcpy(&value, tensor.bytes().data(), sizeof value);
    CHECK(value == first);
  };
  starts_with("model.layers.0.self_attn.q_proj.weight", 0, {q_rows, hidden});
  starts_with("model.layers.0.self_attn.k_proj.weight", q_rows * hidden, {kv_rows, hidden});
  starts_with("model.layers.0.self_attn.v_proj.weight", (q_rows + kv_rows) * hidden, {kv_rows, hidden});
  starts_with("model.layers.0.mlp.gate_proj.weight", 1000, {inner, hidden});
  starts_with("model.layers.0.mlp.up_proj.weight", 1000 + inner * hidden, {inner, hidden});
  starts_with("lm_head.weight", 2000, {hidden});
  CHECK(stored.values().contains("step"));

  std::vector<float> qkv2(qkv.size()), gate_up2(gate_up.size()), head2(head.size());
  std::int64_t step2 = 0;
  auto const report = dcp::load<Files>(self, {store, "model"}, model(qkv2, gate_up2, head2, step2), {.names = names});
  CHECK(qkv2 == qkv);
  CHECK(gate_up2 == gate_up);
  CHECK(head2 == head);
  CHECK(step2 == 7);
  CHECK(report.tensors == 3);
  CHECK(report.unverified_bytes == 0);

  // As the state has it, but for what the rules cannot know of: its wrappers.
  auto const owned = dcp::load_from_keys<Files>(self, {store, "model"}, {"blocks"}, {.names = names});
  REQUIRE(owned.tensors().size() == 2);
  CHECK(owned.tensors().at("blocks.0.attention.qkv.weight").shape() == dcp::Extents{q_rows + 2 * kv_rows, hidden});
  CHECK(std::memcmp(owned.tensors().at("blocks.0.attention.qkv.weight").bytes().data(), qkv.data(), qkv.size() * sizeof(float)) == 0);
}

TEST_CASE("a load reads only the ranges that it needs of what is fused in the checkpoint") {
  dcp::SelfComm self;
  dcp::Memory store;
  constexpr std::int64_t rows = 1024, columns = 1024;
  auto fused = numbers(3 * rows * columns, 0);
  dcp::StateDict state;
  add(state, "qkv", {3 * rows, columns}, fused);
  dcp::save<Files>(self, {store, "model"}, state);
  dcp::NameMap names;
  names.split({"q", "k", "v"}, "qkv");
  dcp::run_threads(3, [&](dcp::ThreadComm& world) {
    std::vector<float> mine(rows * columns);
    auto const bytes = reinterpret_cast<std::byte*>(mine.data());
    dcp::StateDict wanted;
    // Each rank has one of the three, as pipelines do.
    std::vector<std::string> const all{"q", "k", "v"};
    dcp::Layout const layout = dcp::single_rank_layout({rows, columns}, world.rank(), 3);
    wanted.add_tensor(all[static_cast<std::size_t>(world.rank())], dcp::DType::f32, layout, {bytes, dcp::row_major_strides({rows, columns})});
    auto const report = dcp::load<Files>(world, {store, "model"}, wanted, {.names = names, .verify = dcp::Verify::none});
    CHECK(std::equal(mine.begin(), mine.end(), fused.begin() + world.rank() * rows * columns));
    std::uint64_t read = 0;
    for (auto const& phase : report.phases)
      if (phase.name == "read") read = phase.bytes();
    CHECK(read == 3 * rows * columns * sizeof(float));
  });
}

TEST_CASE("quantized tensors are joined, cut and transposed as they are decoded, and joined tensors can be quantized") {
  using Fp8 = dcp::Quantized<dcp::Fp8Block<128, 128>, Files>;
  dcp::Memory store;
  constexpr std::int64_t rows = 256, columns = 384;
  std::vector<float> q(rows * columns), k(rows * columns);
  dcp::test::Random random{5};
  for (auto* values : {&q, &k})
    for (auto& value : *values) value = static_cast<float>(random.between(-64, 64));
  dcp::SelfComm self;
  auto const two = [&](std::vector<float>& a, std::vector<float>& b) {
    dcp::StateDict state;
    add(state, "q.weight", {rows, columns}, a);
    add(state, "k.weight", {rows, columns}, b);
    return state;
  };
  dcp::save<Fp8>(self, {store, "two"}, two(q, k));
  std::vector<float> q8(q.size()), k8(k.size());
  dcp::load<Fp8>(self, {store, "two"}, two(q8, k8));

  dcp::NameMap names;
  names.concat("fused.weight", {"q.weight", "k.weight"});
  for (int const ranks : {1, 3}) {
    CAPTURE(ranks);
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      dcp::DeviceMesh<1> const mesh{world, {ranks}};
      using Rows = dcp::Placement<dcp::Shard<0>>;
      dcp::Extents const shape{2 * rows, columns};
      std::vector<float> mine(dcp::local_box<Rows>(mesh, shape).size());
      dcp::ShardedTensor<float, Rows> const fused{mesh, shape, mine};
      auto const whole = [&](std::size_t i) { return i < q8.size() ? q8[i] : k8[i - q8.size()]; };
      auto const first = static_cast<std::size_t>(fused.local_box().origin[0] * columns);
      auto const report = dcp::load<Fp8>(world, {store, "two"}, {{"fused.weight", fused}}, {.names = names});
      bool same = true;
      for (std::size_t i = 0; i < mine.size(); ++i) same = same && mine[i] == whole(first + i);
      CHECK(same);
      CHECK(report.decoded.size() == 1);
      CHECK(report.unverified_bytes == (ranks == 1 ? 0u : 24u));   // of scales that two ranks need, as without names

      // The way back: of the fused tensor's rows, whoever holds them.
      for (std::size_t i = 0; i < mine.size(); ++i) mine[i] = first + i < q.size() ? q[first + i] : k[first + i - q.size()];
      dcp::save<Fp8>(world, {store, "again" + std::to_string(ranks)}, {{"fused.weight", fused}}, {.names = names});
    });
    std::vector<float> a(q.size()), b(k.size());
    dcp::load<Fp8>(self, {store, "again" + std::to_string(ranks)}, two(a, b));
    CHECK(a == q8);
    CHECK(b == k8);
  }

  std::vector<float> t(q.size()), b(k.size());
  dcp::StateDict turned;
  add(turned, "q.T", {columns, rows}, t);
  add(turned, "k.weight", {rows, columns}, b);
  dcp::NameMap transpose;
  transpose.transpose("q.T", "q.weight");
  dcp::load<Fp8>(self, {store, "two"}, turned, {.names = transpose});
  bool same = true;
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) same = same && t[static_cast<std::size_t>(j * rows + i)] == q8[static_cast<std::size_t>(i * columns + j)];
  CHECK(same);
}

TEST_CASE("what the checkpoint lacks of a tensor that is put together, and what is shaped otherwise, is said by both names") {
  dcp::SelfComm self;
  dcp::Memory store;
  auto q = numbers(12, 0), k = numbers(8, 0), qkv = numbers(24, 0);
  dcp::StateDict stored;
  add(stored, "q", {3, 4}, q);
  add(stored, "k", {2, 4}, k);
  dcp::save<Files>(self, {store, "model"}, stored);
  dcp::StateDict state;
  add(state, "qkv", {6, 4}, qkv);
  dcp::NameMap names;
  names.concat("qkv", {"q", "k", "v"});
  auto const load = [&](dcp::LoadOptions<Files> options) { return dcp::test::error_of([&] { options.names = names; dcp::load<Files>(self, {store, "model"}, state, options); }).value(); };
  auto error = load({});
  CHECK(error.code() == dcp::ErrorCode::missing_entry);
  CHECK(std::string{error.what()}.find("qkv: Missing key in checkpoint; state wants [6, 4] F32, and the checkpoint lacks v") != std::string::npos);
  CHECK(std::string{error.what()}.find("in the checkpoint, but not in the state") == std::string::npos);
  auto v = numbers(4, 0);
  add(stored, "v", {1, 4}, v);
  dcp::save<Files>(self, {store, "model"}, stored, {.if_exists = dcp::IfExists::replace});
  error = load({});
  CHECK(error.code() == dcp::ErrorCode::shape_mismatch);
  CHECK(std::string{error.what()}.find("qkv: q is [3, 4] in the checkpoint and [2, 4] by the names' rules") != std::string::npos);
  auto const report = dcp::load<Files>(self, {store, "model"}, state, {.on_shape = dcp::OnShape::keep, .names = names});
  CHECK(report.kept == std::vector<std::string>{"qkv"});

  // A stored tensor that is in many places is said to be missing once.
  names = dcp::NameMap{}.concat("qkv", {{"q", 0, 2}, {"w", 0, 1}, {"q", 2, 2}, {"w", 1, 1}});
  CHECK(std::string{load({}).what()}.find("and the checkpoint lacks w\n") != std::string::npos);
}

TEST_CASE("ranks that were given different rules are told so, and a tied name can be renamed and not cut") {
  dcp::Memory store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    auto x = numbers(4, 0);
    dcp::StateDict state;
    add(state, "a", {4}, x);
    dcp::NameMap names;
    names.rename("a", world.rank() == 0 ? "b" : "c");
    auto const error = dcp::test::error_of([&] { dcp::save<Files>(world, {store, "model"}, state, {.names = names}); }).value();
    CHECK(error.code() == dcp::ErrorCode::ranks_disagree);
  });
  dcp::SelfComm self;
  auto x = numbers(4, 0);
  dcp::StateDict state;
  add(state, "embed.weight", {4}, x);
  add(state, "head.weight", {4}, x);
  dcp::NameMap renames, cuts;
  renames.rename("embed.weight", "wte").rename("head.weight", "lm_head");
  cuts.concat("embed.weight", {"a", "b"});
  CHECK(dcp::test::error_of([&] { dcp::save<Files>(self, {store, "model"}, state, {.names = cuts}); }).value().code() == dcp::ErrorCode::invalid_argument);
  dcp::save<Files>(self, {store, "model"}, state, {.names = renames});
  auto const stored = dcp::load_from_keys<Files>(self, {store, "model"});
  CHECK(stored.tensors().contains("wte"));
  CHECK(stored.tensors().contains("lm_head"));
  std::fill(x.begin(), x.end(), 0.0f);
  dcp::load<Files>(self, {store, "model"}, state, {.names = renames});
  CHECK(x == numbers(4, 0));
}

TEST_CASE("convert gives names and pieces to what it writes, and reads tensors when they are written") {
  dcp::SelfComm self;
  dcp::Memory store;
  auto qkv = numbers(12 * 4, 0), w = numbers(3 * 5, 500);
  dcp::StateDict state;
  add(state, "qkv", {12, 4}, qkv);
  add(state, "w", {3, 5}, w);
  dcp::save<Torch>(self, {store, "torch"}, state);
  dcp::ConvertOptions<Torch, Files> options;
  options.save.names.concat("qkv", {"q", "k", "v"}).transpose("w", "w.T");
  dcp::run_threads(2, [&](dcp::ThreadComm& world) { dcp::convert<Torch, Files>(world, {store, "torch"}, {store, "files"}, options); });
  std::vector<float> qkv2(qkv.size()), w2(w.size());
  dcp::StateDict back;
  add(back, "qkv", {12, 4}, qkv2);
  add(back, "w", {3, 5}, w2);
  dcp::load<Files>(self, {store, "files"}, back, {.names = options.save.names});
  CHECK(qkv2 == qkv);
  CHECK(w2 == w);
  auto const stored = dcp::load_from_keys<Files>(self, {store, "files"});
  CHECK(stored.tensors().at("w.T").shape() == dcp::Extents{5, 3});
  dcp::ConvertOptions<Torch, Files> wrong;
  wrong.load.names = options.save.names;
  CHECK(dcp::test::error_of([&] { dcp::convert<Torch, Files>(self, {store, "torch"}, {store, "other"}, wrong); }).value().code() == dcp::ErrorCode::invalid_argument);
}

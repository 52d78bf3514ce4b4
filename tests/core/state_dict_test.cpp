// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/state_dict.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <map>
#include <string>
#include <vector>

using namespace dcp;
using dcp::test::Ranks;

namespace {
using Rows = Placement<Shard<0>>;
using Names = std::vector<std::string>;

Names names_of(StateDict const& state) {
  Names names;
  for (auto const& entry : state.entries()) names.push_back(entry.name);
  return names;
}
StateEntry const& entry_of(StateDict const& state, std::string const& name) {
  for (auto const& entry : state.entries())
    if (entry.name == name) return entry;
  FAIL("no entry ", name);
  return state.entries().front();
}

struct Linear {
  std::vector<float> memory = std::vector<float>(6);
  int loaded = 0;
  TensorView<float> weight{memory, {3, 2}};
  StateDict state() { return {{"weight", weight}}; }
  void after_load() { ++loaded; }
};
struct Model {
  Linear first, second;
  std::vector<std::string>* order = nullptr;
  StateDict state() { return {{"first", first}, {"second", second}}; }
  void after_load() {
    if (order != nullptr) order->push_back("model");
  }
};

// A type of another library.
struct Matrix {
  std::vector<double> memory = std::vector<double>(4);
};
struct Json {
  std::string text = "{}";
};
}  // namespace

template <>
struct dcp::EntryOf<Matrix> {
  static constexpr bool is_view = false;
  static void add(StateDict& state, std::string const& name, Matrix& object) {
    state.add_tensor(name, DType::f64, plain_layout({2, 2}), {reinterpret_cast<std::byte*>(object.memory.data()), {2, 1}});
  }
};
template <>
struct dcp::EntryOf<Json> {
  static constexpr bool is_view = false;
  static void add(StateDict& state, std::string const& name, Json& object) { state.add_value(name, {&object.text, detail::value_ops<std::string>(), false, RankPolicy::fail}); }
};

TEST_CASE("StateDict: holds tensors and values in the order given, under their names, as views") {
  std::vector<float> memory(10), plain(6);
  int step = 7;
  std::string note = "hello";
  Bytes blob{std::byte{1}};
  ShardedTensor<float, Rows> const w{DeviceMesh<1>{Ranks{1, 4}, {4}}, {7, 5}, memory};
  StateDict const state{{"w", w}, {"step", step}, {"note", note}, {"b", TensorView<float>{plain, {2, 3}}}, {"blob", blob}};
  CHECK(names_of(state) == Names{"w", "step", "note", "b", "blob"});
  CHECK(state.size() == 5);
  auto const& tensor = *entry_of(state, "w").tensor;
  CHECK(tensor.dtype == DType::f32);
  CHECK(tensor.layout == w.layout());
  CHECK(tensor.memory.data == reinterpret_cast<std::byte*>(memory.data()));
  CHECK(entry_of(state, "b").tensor->layout.everywhere);
  auto const& value = entry_of(state, "step").value;
  CHECK(value.object == &step);
  CHECK(value.ops->kind == ValueKind::number);
  CHECK_FALSE(value.per_rank);
  step = 8;   // a view: what is stored is what is there when it is read
  CHECK(to_json(value.ops->encode(value.object)) == "8");
  value.ops->decode(value.object, Value{ValueKind::number, DType::i32, {std::byte{5}, {}, {}, {}}, {}});
  CHECK(step == 5);
}

TEST_CASE("StateDict: empty ones are ordinary") {
  StateDict const none, braces{};
  CHECK(none.empty());
  CHECK(braces.size() == 0);
  CHECK(names_of(StateDict{{"nothing", none}}).empty());
  Model model;
  StateDict state{{"a", StateDict{}}, {"model", model}};
  CHECK(state.size() == 2);
}

TEST_CASE("StateDict: nested states and braces join their names with dots") {
  Model model;
  double rate = 0.1;
  int step = 1;
  StateDict const state{{"model", model}, {"optimizer", {{"groups", {{"0", {{"lr", rate}}}}}, {"step", step}}}};
  CHECK(names_of(state) == Names{"model.first.weight", "model.second.weight", "optimizer.groups.0.lr", "optimizer.step"});
  // An object itself, without a name, adds no prefix.
  CHECK(names_of(StateDict{model}) == Names{"first.weight", "second.weight"});
  CHECK(names_of(StateDict{{"", model}}) == Names{"first.weight", "second.weight"});
}

TEST_CASE("StateDict: names keep dots, blanks and Unicode as they are") {
  int x = 0;
  std::string const name = "a.b..c d\n\xE2\x82\xAC\xF0\x9F\x98\x80";
  CHECK(names_of(StateDict{{name, x}}) == Names{name});
  CHECK(names_of(StateDict{{"p", {{name, x}}}}) == Names{"p." + name});
  std::string with_zero("a\0b", 3);
  CHECK(names_of(StateDict{{with_zero, x}}) == Names{with_zero});
}

TEST_CASE("StateDict: a name that is no UTF-8, or that the safetensors format takes, is refused") {
  int x = 0;
  for (char const* bad : {"\xFF", "a\xC0\x80", "\xED\xA0\x80", "a\xE2\x82"}) {
    try {
      StateDict const state{{bad, x}};
      FAIL("accepted");
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::bad_utf8);
      CHECK(first_invalid_utf8(error.what()) == std::string::npos);   // what() can be printed and logged
    }
  }
  CHECK_THROWS_AS((StateDict{{"__metadata__", x}}), Error);
}

TEST_CASE("StateDict: on a rank outside its mesh a tensor adds no entry") {
  std::vector<float> memory(100);
  auto const stage = DeviceMesh<2>{Ranks{5, 6}, {2, 3}}.sub<1>({0});
  ShardedTensor<float, Rows> const w{stage, {7, 5}, memory};
  CHECK(StateDict{{"w", w}}.empty());
}

TEST_CASE("StateDict: after_load of nested objects is remembered with its name, inner ones first") {
  Model model;
  std::vector<std::string> order;
  model.order = &order;
  StateDict const state{{"m", model}, {"again", StateDict{{"lin", model.first}}}};
  Names hooks;
  for (auto const& hook : state.hooks()) hooks.push_back(hook.name), hook.call(hook.object);
  CHECK(hooks == Names{"m.first", "m.second", "m", "again.lin"});
  CHECK(model.first.loaded == 2);
  CHECK(model.second.loaded == 1);
  CHECK(order == Names{"model"});
}

TEST_CASE("StateDict: per_rank values say so, with their policy, whatever kind they are") {
  std::string rng = "state";
  std::vector<bool> flags{true};
  Bytes blob;
  Json document;
  StateDict const state{{"rng", per_rank(rng)}, {"flags", per_rank(flags, RankPolicy::wrap)}, {"blob", per_rank(blob, RankPolicy::rank0)}, {"json", per_rank(document)}};
  for (auto const& entry : state.entries()) CHECK(entry.value.per_rank);
  CHECK(entry_of(state, "rng").value.policy == RankPolicy::fail);
  CHECK(entry_of(state, "flags").value.policy == RankPolicy::wrap);
  CHECK(entry_of(state, "blob").value.policy == RankPolicy::rank0);
  CHECK(entry_of(state, "json").value.object == &document.text);
  Matrix matrix;
  CHECK_THROWS_WITH_AS((StateDict{{"m", per_rank(matrix)}}), doctest::Contains("m: per_rank holds a tensor"), Error);
}

TEST_CASE("StateDict: vectors of bool are values like others") {
  std::vector<bool> flags{true, false, true};
  StateDict const state{{"flags", flags}};
  auto const& value = entry_of(state, "flags").value;
  CHECK(value.ops->dtype == DType::boolean);
  Value const stored = value.ops->encode(value.object);
  flags.clear();
  value.ops->decode(value.object, stored);
  CHECK(flags == std::vector<bool>{true, false, true});
}

TEST_CASE("StateDict: types of other libraries come through EntryOf") {
  Matrix matrix;
  StateDict const state{{"matrix", matrix}};
  CHECK(entry_of(state, "matrix").tensor->dtype == DType::f64);
  CHECK(entry_of(state, "matrix").tensor->layout.shape == Extents{2, 2});
}

TEST_CASE("StateDict: entries can be added one by one, and copies are independent") {
  int x = 1, y = 2;
  Linear linear;
  StateDict state;
  state.add("x", x).add("linear", linear);
  StateDict copy = state;
  copy.add("y", y);
  CHECK(names_of(state) == Names{"x", "linear.weight"});
  CHECK(names_of(copy) == Names{"x", "linear.weight", "y"});
  CHECK(copy.hooks().size() == 1);
  CHECK(entry_of(copy, "linear.weight").tensor.get() != entry_of(state, "linear.weight").tensor.get());
  state = copy;
  CHECK(state.size() == 3);
  StateDict const& alias = state;
  state = alias;   // itself
  CHECK(state.size() == 3);
  StateDict const moved = std::move(copy);
  CHECK(moved.size() == 3);
}

TEST_CASE("StateDict: a revision is that of one list of entries only, wherever it is moved to") {
  int a = 1, b = 2;
  dcp::StateDict state{{"a", a}};
  auto const one = state.revision();
  CHECK(one != 0);
  dcp::StateDict moved{std::move(state)};
  CHECK(moved.revision() == one);
  CHECK(dcp::StateDict{moved}.revision() != one);   // a copy is another list
  state = dcp::StateDict{};
  CHECK(state.empty());
  CHECK(state.revision() == 0);
  moved.add("b", b);
  CHECK(moved.revision() != one);
  dcp::StateDict const same{{"a", a}}, again{{"a", a}};
  CHECK(same.revision() != again.revision());
  CHECK(dcp::StateDict{}.revision() == 0);
}

TEST_CASE("StateDict: ties are entries, and nesting prefixes both of their names") {
  Linear linear;
  StateDict model{{"embed", linear}};
  model.tie("head.weight", "embed.weight");
  StateDict const state{{"model", model}};
  auto const& entry = entry_of(state, "model.head.weight");
  CHECK(entry.kind == StateEntry::Kind::tie);
  CHECK(entry.tie.kept == "model.embed.weight");
  CHECK_THROWS_AS(model.tie("\xFF", "embed.weight"), Error);
}

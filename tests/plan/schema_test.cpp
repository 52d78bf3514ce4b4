// SPDX-License-Identifier: Apache-2.0
#include <dcp/plan/schema.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::test;

namespace {

SchemaEntry tensor(std::string name, Layout const& layout, DType dtype = DType::f32) {
  SchemaEntry entry;
  entry.name = std::move(name);
  entry.dtype = dtype;
  entry.layout = layout;
  return entry;
}
SchemaEntry number(std::string name, std::uint64_t crc, bool per_rank = false) {
  SchemaEntry entry;
  entry.name = std::move(name);
  entry.is_tensor = false;
  entry.dtype = DType::i32;
  entry.per_rank = per_rank;
  entry.value_crc = crc;
  return entry;
}
Layout rows_over(std::int64_t ranks, Extents const& shape) {
  Layout layout = replicated_layout(shape, ranks);
  layout.rules[0] = {RuleKind::shard, 0, -1};
  return layout;
}
std::string refusal(std::vector<Schema> parts, std::vector<std::int64_t> const& first_rank, std::int64_t ranks) {
  try {
    merge_schemas(std::move(parts), first_rank, ranks);
  } catch (Error const& error) {
    return error.message();
  }
  return "merged";
}

}  // namespace

TEST_CASE("sorted_entries: by name, and every name that comes twice is listed") {
  int a = 0, b = 0, c = 0;
  StateDict const state{{"b", b}, {"a", a}, {"c", c}};
  CHECK(sorted_entries(state) == std::vector<std::size_t>{1, 0, 2});
  CHECK(sorted_entries(StateDict{}).empty());
  try {
    sorted_entries(StateDict{{"x", a}, {"y", b}, {"x", c}, {"m", {{"y", a}}}, {"y", c}});
    FAIL("accepted");
  } catch (Error const& error) {
    CHECK(error.code() == ErrorCode::duplicate_entry);
    CHECK(error.message().find("x: the state has two entries of this name") != std::string::npos);
    CHECK(error.message().find("y: the state has two entries of this name") != std::string::npos);
    CHECK(error.message().find("m.y") == std::string::npos);
  }
  // A name is taken by a tie, too.
  StateDict tied{{"x", a}};
  tied.tie("x", "y");
  CHECK_THROWS_AS(sorted_entries(tied), Error);
}

TEST_CASE("local_schema: tensors with their layouts, values with the CRC of what they are, ties apart") {
  std::vector<float> memory(10);
  int step = 3;
  std::string rng = "r";
  StateDict state{{"w", TensorView<float>{memory, {2, 5}}}, {"step", step}, {"rng", per_rank(rng)}};
  state.tie("head", "w");
  Schema const schema = local_schema(state, true);
  REQUIRE(schema.entries.size() == 3);
  CHECK(schema.entries[0].name == "rng");
  CHECK(schema.entries[0].per_rank);
  CHECK(schema.entries[0].value_crc == 0);   // each rank has its own
  CHECK(schema.find("step")->value_kind == ValueKind::number);
  CHECK(schema.find("step")->value_crc != 0);
  CHECK(schema.find("w")->layout.everywhere);
  CHECK(schema.find("head") == nullptr);
  CHECK(schema.ties == std::vector<Tie>{{"head", "w"}});
  auto const before = schema.find("step")->value_crc;
  step = 4;
  CHECK(local_schema(state, true).find("step")->value_crc != before);
  CHECK(local_schema(state, false).find("step")->value_crc == 0);
}

TEST_CASE("values: 1 as an int and 1 as a float, 0 and -0, and NaNs of different bits differ") {
  auto const crc = [](auto x) { return value_crc(detail::value_ops<decltype(x)>()->encode(&x)); };
  CHECK(crc(1) != crc(std::int64_t{1}));
  CHECK(crc(1) != crc(1.0f));
  CHECK(crc(0.0) != crc(-0.0));
  CHECK(crc(std::bit_cast<double>(std::uint64_t{0x7FF8000000000000})) != crc(std::bit_cast<double>(std::uint64_t{0x7FF8000000000001})));
  CHECK(crc(std::string{"1"}) == crc(std::string{"1"}));
}

TEST_CASE("law: a schema is the same after a journey as bytes, and its digest tells layouts apart") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 2000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Schema schema;
    for (auto n = random.between(0, 5); n > 0; --n) schema.entries.push_back(random.one_in(3) ? number("v" + std::to_string(n), 5, random.one_in(2)) : tensor("t" + std::to_string(n), any_layout(random), DType::bf16));
    if (random.one_in(2)) schema.ties.push_back({"a", "b"});
    Schema again = decode_schema(encode(schema));
    REQUIRE(encode(again) == encode(schema));
    REQUIRE(again.entries.size() == schema.entries.size());
    for (std::size_t i = 0; i < schema.entries.size(); ++i) {
      REQUIRE(again.entries[i].name == schema.entries[i].name);
      REQUIRE(again.entries[i].layout == schema.entries[i].layout);
      REQUIRE(again.entries[i].per_rank == schema.entries[i].per_rank);
    }
    REQUIRE(again.ties == schema.ties);
    REQUIRE(schema_digest(again) == schema_digest(schema));
    for (auto& entry : again.entries) entry.value_crc += 1;   // what values are is compared apart
    REQUIRE(schema_digest(again) == schema_digest(schema));
    if (schema.entries.empty()) continue;
    auto& changed = again.entries[static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(again.entries.size()) - 1))];
    if (!changed.is_tensor) {
      REQUIRE((values_digest(again) != values_digest(schema) || changed.per_rank));
      changed.dtype = DType::f64;
    } else if (changed.layout.mesh.axes > 0 && random.one_in(2)) {
      changed.layout.rules[0] = changed.layout.rules[0].kind == RuleKind::shard ? Rule{} : Rule{RuleKind::shard, 0, -1};
    } else if (changed.layout.shape.rank() > 0 && random.one_in(2)) {
      ++changed.layout.split_shape[0];
    } else {
      changed.layout.mesh.base += 1;
    }
    REQUIRE(schema_digest(again) != schema_digest(schema));
  }
}

TEST_CASE("decode_schema: damaged bytes give some schema, never more than there are bytes for") {
  Random random{first_seed()};
  for (int round = 0; round < 500; ++round) {
    Schema schema;
    schema.entries.push_back(tensor("t", any_layout(random)));
    Bytes bytes = encode(schema);
    if (random.one_in(2)) bytes.resize(static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(bytes.size()))));
    else std::fill_n(bytes.begin(), 8, std::byte{0xFF});
    CHECK(decode_schema(bytes).entries.size() <= bytes.size());
  }
}

TEST_CASE("merge_schemas: one kind of rank: plain tensors are replicated over all ranks") {
  Schema part;
  part.entries = {tensor("plain", plain_layout({3})), number("step", 7), tensor("w", rows_over(4, {8}))};
  Schema const all = merge_schemas({part}, {0}, 4);
  REQUIRE(all.entries.size() == 3);
  CHECK(all.find("plain")->layout == replicated_layout({3}, 4));
  CHECK(all.find("w")->layout == rows_over(4, {8}));
}

TEST_CASE("merge_schemas: what only some ranks list belongs to the lowest of them") {
  Schema first, second;
  first.entries = {tensor("both", plain_layout({3})), tensor("left", plain_layout({2})), number("only", 7)};
  second.entries = {tensor("both", plain_layout({3})), tensor("right", plain_layout({5}))};
  first.ties = {{"a", "both"}, {"z", "both"}};
  second.ties = {{"a", "both"}};
  Schema const all = merge_schemas({first, second}, {0, 2}, 4);
  REQUIRE(all.entries.size() == 4);
  CHECK(all.find("both")->layout == replicated_layout({3}, 4));
  CHECK(all.find("left")->layout == single_rank_layout({2}, 0, 4));
  CHECK(all.find("right")->layout == single_rank_layout({5}, 2, 4));
  CHECK(all.find("right")->first_rank == 2);
  CHECK(all.find("only")->first_rank == 0);
  CHECK(all.ties == std::vector<Tie>{{"a", "both"}, {"z", "both"}});
}

TEST_CASE("merge_schemas: every difference is named, with a rank of each side") {
  Schema a, b;
  a.entries = {tensor("dtype", rows_over(2, {4})),  tensor("kind", rows_over(2, {4})), tensor("layout", rows_over(2, {4})), number("per", 0, true),
               tensor("shape", rows_over(2, {4})), number("type", 0),                 number("value", 1)};
  b = a;
  b.entries[0].dtype = DType::bf16;
  b.entries[1] = number("kind", 0);
  b.entries[2].layout.rules[0] = {};
  b.entries[4].layout = rows_over(2, {5});
  b.entries[5].dtype = DType::f64;
  b.entries[6].value_crc = 2;
  b.entries.erase(b.entries.begin() + 3);
  std::string const message = refusal({a, b}, {0, 1}, 2);
  for (char const* sentence :
       {"dtype: different dtypes on rank 0 and on rank 1", "kind: a tensor and a value of the same name, on rank 0 and on rank 1", "layout: tensors on different meshes or placements have the same name on rank 0",
        "per: a per-rank value must be listed by every rank, and rank 0 lists it", "shape: shape [4] and shape [5] on rank 0 and on rank 1", "type: values of different types, on rank 0 and on rank 1",
        "value: different values on rank 0 and on rank 1; declare it per_rank"})
    CHECK_MESSAGE(message.find(sentence) != std::string::npos, sentence, " is not in ", message);
}

TEST_CASE("merge_schemas: a mesh made for another communicator is refused") {
  Schema part;
  part.entries = {tensor("w", rows_over(8, {8}))};
  CHECK(refusal({part}, {0}, 4) == "w: its mesh was made for a communicator of 8 ranks, and this one has 4");
}

TEST_CASE("Problems: one error with the code of the first, all sentences, and a count of what is beyond a thousand") {
  Problems problems;
  CHECK(problems.empty());
  CHECK_NOTHROW(problems.raise());
  for (int i = 0; i < 1005; ++i) problems.add(i == 0 ? ErrorCode::missing_entry : ErrorCode::shape_mismatch, "p" + std::to_string(i));
  problems.hint("do this");
  problems.hint("not that");
  try {
    problems.raise();
    FAIL("no error");
  } catch (Error const& error) {
    CHECK(error.code() == ErrorCode::missing_entry);
    CHECK(error.message().starts_with("p0\n  also      p1\n"));
    CHECK(error.message().find("p999") != std::string::npos);
    CHECK(error.message().find("p1000") == std::string::npos);
    CHECK(error.message().ends_with("5 more"));
    CHECK(error.hint() == "do this");
  }
}

// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/name_map.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace {

using dcp::Extents, dcp::MappedTensor, dcp::NameMap;

std::vector<MappedTensor> tensors_of(std::vector<std::pair<std::string, Extents>> const& list, dcp::DType dtype = dcp::DType::f32) {
  std::vector<MappedTensor> tensors;
  for (auto const& [name, shape] : list) tensors.push_back({name, dtype, shape, {dcp::PlacedBox::whole(static_cast<std::uint32_t>(tensors.size()), shape)}, false});
  return tensors;
}
std::string names_of(std::vector<MappedTensor> tensors) {
  std::sort(tensors.begin(), tensors.end(), [](auto const& a, auto const& b) { return a.name < b.name; });
  std::string text;
  for (auto const& tensor : tensors) text += (text.empty() ? "" : " ") + tensor.name + to_string(tensor.shape);
  return text;
}
std::string stored(NameMap const& names, std::vector<std::pair<std::string, Extents>> const& list) {
  try {
    return names_of(names.stored_tensors(tensors_of(list)));
  } catch (dcp::Error const& error) {
    return std::string{to_string(error.code())} + ": " + error.message();
  }
}
std::string state(NameMap const& names, std::vector<std::pair<std::string, Extents>> const& list) { return names_of(names.state_tensors(tensors_of(list))); }
std::string refusal(auto make) {
  try {
    make();
    return "accepted";
  } catch (dcp::Error const& error) {
    return error.message();
  }
}

}  // namespace

TEST_CASE("NameMap: names and prefixes are replaced, wrappers dropped, and rules apply one after the other") {
  NameMap names;
  names.drop("module.").drop("_orig_mod.").rename_prefix("encoder.", "bert.").rename("bert.pooler", "pooler").rename("bert.layer.*.w*", "bert.*.weight*");
  CHECK(names.stored_name("module.encoder._orig_mod.layer.3.w1") == "bert.3.weight1");
  CHECK(names.stored_name("encoder.module.module.pooler") == "pooler");
  CHECK(names.stored_name("submodule.x") == "submodule.x");
  CHECK(names.stored_name("bert.layer.a.b.w1") == "bert.layer.a.b.w1");   // a star is one component at most
  CHECK(names.stored_name("bert.layer.3.w") == "bert.layer.3.w");         // and not nothing
  CHECK(names.state_name("bert.3.weight1") == "encoder.layer.3.w1");
  CHECK(names.state_name("pooler") == "encoder.pooler");
  CHECK(NameMap{}.rename_prefix("", "model.").stored_name("x") == "model.x");
  CHECK(NameMap{}.rename_prefix("", "model.").state_name("model.x") == "x");
  CHECK(NameMap{}.rename_prefix("model.", "").stored_name("model.x") == "x");
}

TEST_CASE("NameMap: a star takes what lets the rest match") {
  CHECK(NameMap{}.rename("*_proj.*", "*|*").stored_name("up_proj_proj.weight") == "up_proj|weight");
  CHECK(NameMap{}.rename("a*b*c", "*,*").stored_name("axbbyc") == "xb,y");
}

TEST_CASE("NameMap: fused tensors have the extents of their parts, both ways") {
  NameMap names;
  names.concat("l.*.qkv", {{"l.*.q", 8}, {"l.*.k", 2}, "l.*.v"}).split({"l.*.gate", "l.*.up"}, "l.*.gate_up", 1);
  CHECK(stored(names, {{"l.0.qkv", {12, 4}}, {"l.0.gate", {3, 5}}, {"l.0.up", {3, 6}}, {"x", {1}}}) == "l.0.gate_up[3, 11] l.0.k[2, 4] l.0.q[8, 4] l.0.v[2, 4] x[1]");
  CHECK(state(names, {{"l.7.q", {8, 4}}, {"l.7.k", {2, 4}}, {"l.7.v", {2, 4}}, {"l.7.gate_up", {3, 10}}}) == "l.7.gate[3, 5] l.7.qkv[12, 4] l.7.up[3, 5]");
}

TEST_CASE("NameMap: transposed tensors have their dimensions in the other order, both ways") {
  NameMap names;
  names.transpose("c", "h", {2, 0, 1});   // dimension 0 of the state's is dimension 2 of the checkpoint's
  CHECK(stored(names, {{"c", {5, 6, 7}}}) == "h[6, 7, 5]");
  CHECK(state(names, {{"h", {6, 7, 5}}}) == "c[5, 6, 7]");
  auto const made = names.stored_tensors(tensors_of({{"c", {5, 6, 7}}}));
  dcp::Box const part{{1, 2, 3}, {2, 3, 4}};
  CHECK(made[0].from[0].placed(part) == dcp::Box{{2, 3, 1}, {3, 4, 2}});
  CHECK(made[0].from[0].original(dcp::Box{{2, 3, 1}, {3, 4, 2}}) == part);
}

TEST_CASE("NameMap: every element has one place, or the error says which has none or two") {
  auto const cut = [](std::vector<NameMap::Slice> slices) { return stored(NameMap{}.concat("w", std::move(slices)), {{"w", {10, 2}}}); };
  CHECK(cut({{"a", 4}, {"b", 6}}) == "a[4, 2] b[6, 2]");
  CHECK(cut({"a", "b", "c"}) == "shape_mismatch: names: w [10, 2]: dimension 0 cannot be cut as the rule says, 10 would be left for 3 equal parts");
  CHECK(cut({{"a", 4}, {"b", 5}}) == "shape_mismatch: names: w [10, 2]: dimension 0 cannot be cut as the rule says, 1 would be left");
  CHECK(cut({{"a", 0, 5}, {"a", 4, 5}}) == "shape_mismatch: names: w [10, 2]: as a: element 4 along the dimension is used twice");
  CHECK(cut({{"a", 0, 5}, {"a", 6, 5}}) == "shape_mismatch: names: w [10, 2]: as a: element 5 along the dimension is not used");
  CHECK(cut({{"a", 5, 5}, {"a", 0, 5}}) == "a[10, 2]");
  CHECK(stored(NameMap{}.concat("w", {"a", "b"}, 2), {{"w", {10, 2}}}) == "shape_mismatch: names: w [10, 2]: it has no dimension 2 to be cut along");

  auto const joined = [](std::vector<NameMap::Slice> slices, std::vector<std::pair<std::string, Extents>> const& list) { return stored(NameMap{}.split(std::move(slices), "w"), list); };
  CHECK(joined({{"a", 0, 2}, "b", {"a", 2, 2}}, {{"a", {4, 2}}, {"b", {1, 2}}}) == "w[5, 2]");
  CHECK(joined({"a", "b"}, {{"a", {4, 2}}}) == "missing_entry: names: w is made of several tensors, and there is no b");
  CHECK(joined({"a", "b"}, {{"a", {4, 2}}, {"b", {4, 3}}}) == "shape_mismatch: names: w is made of [4, 2] and, in b, [4, 3], joined along dimension 0");
  CHECK(joined({{"a", 3}, "b"}, {{"a", {4, 2}}, {"b", {4, 2}}}) == "shape_mismatch: names: a [4, 2] as part of w: element 3 along the dimension is not used");
  CHECK(joined({{"a", 5}, "b"}, {{"a", {4, 2}}, {"b", {4, 2}}}) == "shape_mismatch: names: a [4, 2] as part of w: the slices end at 5, and the dimension has 4");
  CHECK(joined({"a", "a"}, {{"a", {4, 2}}}) == "shape_mismatch: names: a [4, 2] as part of w: element 0 along the dimension is used twice");
  CHECK(stored(NameMap{}.rename("a", "b"), {{"a", {1}}, {"b", {1}}}) == "duplicate_entry: names: two tensors would have the name b");
  CHECK(stored(NameMap{}.drop("module."), {{"a", {1}}, {"module.a", {1}}}) == "duplicate_entry: names: two tensors would have the name a");
  CHECK(stored(NameMap{}.transpose("a", "b"), {{"a", {1}}}) == "shape_mismatch: names: a: the rule orders 2 dimensions, and it has shape [1]");
  auto mixed = tensors_of({{"a", {4}}, {"b", {4}}});
  mixed[1].dtype = dcp::DType::bf16;
  CHECK(refusal([&] { static_cast<void>(NameMap{}.split({"a", "b"}, "w").stored_tensors(mixed)); }) == "names: w is made of F32 and, in b, BF16");
  CHECK(refusal([&] { static_cast<void>(NameMap{}.transpose("a", "b").stored_tensors(tensors_of({{"a", {4, 2}}}, dcp::DType::f4))); }).ends_with("can be renamed, not cut or transposed"));
}

TEST_CASE("NameMap: a rule that cannot be meant is refused where it is given") {
  CHECK(refusal([] { NameMap{}.rename("a.*", "b"); }) == "names: b and a.* have different numbers of *");
  CHECK(refusal([] { NameMap{}.drop("module"); }) == "names: what is dropped is a whole component, and ends with '.'");
  CHECK(refusal([] { NameMap{}.transpose("a", "b", {0, 2}); }) == "names: a: this is no order of dimensions");
  CHECK(refusal([] { NameMap{}.concat("a", {}); }) == "names: a rule without names");
  CHECK(refusal([] { NameMap{}.concat("a", {{"b", 1, NameMap::Slice::all}}); }) == "names: b: this is no slice");
  CHECK(refusal([] { NameMap{}.concat("a", {"b"}, -1); }) == "names: a dimension -1");
}

TEST_CASE("NameMap: rules are equal where their texts are") {
  auto const text = [](auto make) {
    NameMap names;
    make(names);
    return names.text();
  };
  std::vector<std::string> const texts{text([](NameMap&) {}), text([](NameMap& n) { n.rename("a", "b"); }), text([](NameMap& n) { n.rename("b", "a"); }), text([](NameMap& n) { n.rename_prefix("a", "b"); }),
                                       text([](NameMap& n) { n.concat("a", {"b", "c"}); }), text([](NameMap& n) { n.concat("a", {"b", "c"}, 1); }), text([](NameMap& n) { n.concat("a", {{"b", 3}, "c"}); }),
                                       text([](NameMap& n) { n.transpose("a", "b"); }), text([](NameMap& n) { n.transpose("a", "b", {0, 1}); })};
  for (std::size_t i = 0; i < texts.size(); ++i)
    for (std::size_t j = 0; j < i; ++j) CHECK(texts[i] != texts[j]);
}

// SPDX-License-Identifier: Apache-2.0
// seconds: 60
// libFuzzer target: any bytes as the .metadata of a checkpoint of PyTorch, and as an object that torch.save wrote. Metadata that is accepted survives being written
// again, and so does an object, but for what JSON cannot tell apart.

#include <dcp/formats/torch_metadata.hpp>
#include <dcp/formats/torch_objects.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

namespace {

bool same(dcp::torch::ItemPlace const& a, dcp::torch::ItemPlace const& b) { return a.path == b.path && a.offset == b.offset && a.length == b.length; }

void metadata(dcp::ConstByteSpan bytes) try {
  auto const first = dcp::torch::parse_metadata(bytes);
  auto const again = dcp::torch::parse_metadata(dcp::torch::write_metadata(first));
  if (again.entries.size() != first.entries.size()) std::abort();
  for (std::size_t i = 0; i < first.entries.size(); ++i) {
    auto const &a = first.entries[i], &b = again.entries[i];
    if (a.name != b.name || a.is_tensor != b.is_tensor || a.chunks.size() != b.chunks.size()) std::abort();
    if (a.is_tensor && (a.dtype != b.dtype || !(a.shape == b.shape))) std::abort();
    if (!a.is_tensor && !same(a.place, b.place)) std::abort();
    for (std::size_t c = 0; c < a.chunks.size(); ++c)
      if (!(a.chunks[c].box == b.chunks[c].box) || !same(a.chunks[c].place, b.chunks[c].place)) std::abort();
  }
} catch (dcp::Error const&) {
}

void object(dcp::ConstByteSpan bytes) try {
  dcp::pickle::ParseOptions parse;
  parse.opaque = true;
  auto const tree = dcp::pickle::Tree::parse(bytes, dcp::torch::is_known_global<>, parse);
  dcp::torch::ObjectOptions options;
  options.opaque = true;
  options.max_nodes = 100'000;
  options.max_text_bytes = 1 << 22;
  auto const records = [](std::string_view) { return dcp::ConstByteSpan{}; };
  auto const value = dcp::torch::to_value(tree.root(), records, options);
  std::vector<dcp::torch::ObjectRecord> storages;
  auto const written = dcp::torch::write_object(value, storages);
  auto const again = dcp::pickle::Tree::parse(written, dcp::torch::is_known_global<>);
  auto const text = dcp::to_json(dcp::torch::to_value(again.root(), records, options));
  if (value.kind != dcp::ValueKind::json && text != dcp::to_json(value)) std::abort();
  dcp::torch::for_each_leaf(tree.root(), [](dcp::torch::Leaf const&, dcp::pickle::Value const&) {});
} catch (dcp::Error const&) {
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  auto const bytes = std::as_bytes(std::span{data, size});
  metadata(bytes);
  object(bytes);
  return 0;
}

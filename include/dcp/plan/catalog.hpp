// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a checkpoint holds, whatever its format: tensors as boxes in files, values, tied names.

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/core/box.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/encoding.hpp>
#include <dcp/core/value.hpp>
#include <dcp/plan/schema.hpp>

#include <algorithm>
#include <compare>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

/// A tensor, or a piece of one, as the header of one file describes it.
struct FoundTensor {
  std::string name;
  DType dtype{};
  Extents shape;            // of what this file holds
  std::uint64_t offset = 0; // in the file, in bytes
  Extents origin;           // of the piece in the global tensor; all 0 for a whole one
  Bytes content{};          // of a small tensor that must be known before anything can be planned
  std::uint64_t container_bytes = 0;   // as of a StoredPiece
};
/// What the header of one file says.
struct FoundFile {
  std::string path;
  std::uint64_t size = 0;
  std::uint64_t version = 0;  // of the medium's, to notice that the file was replaced after its header was read
  bool pieces = false;      // whether the file says that its tensors are pieces of larger ones
  std::vector<FoundTensor> tensors;
  std::vector<Tie> ties;
  std::vector<std::pair<std::string, Value>> values{};   // of formats that hold some beside tensors
  std::vector<std::pair<std::string, NameJoints>> joints{};   // of names from nested states
};

struct CatalogFile {
  std::string path;
  std::uint64_t size = 0, version = 0;
};
struct CatalogTensor;
/// Of a piece that is a part of what is stored at its place: all of that, a box with the dimensions in the order in which they are stored. Dimension d of it is
/// dimension order[d] of the tensor, with the same coordinates.
struct PieceArray {
  Box array;
  Extents order;
};
struct StoredPiece {
  std::uint32_t file;
  std::uint64_t offset;
  Box box;
  std::uint64_t container_bytes = 0;                        // of the archive at `offset` that holds the piece, until it has been looked for there
  std::optional<std::uint32_t> crc32{};                     // of the piece's bytes
  std::shared_ptr<CatalogTensor const> decoded{};           // of a piece that does not lie there as it is: itself as a tensor
  std::shared_ptr<PieceArray const> inside{};               // of a piece that is a part of another
};
struct CatalogTensor {
  std::string name;
  DType dtype{};
  Extents shape;
  std::vector<StoredPiece> pieces;   // in order of preference where they overlap
  std::vector<StoredPiece> copies;   // with the box of a piece before them: read only to be compared
  // Of a tensor that is decoded: how, and where its parts lie. It has no pieces of its own; dtype is what it becomes if nothing else is asked for.
  std::shared_ptr<Encoding const> encoding{};
  std::vector<std::vector<StoredPiece>> parts{};
  bool of_encoded = false;   // it has pieces, and all of them are decoded from tensors that become any float

  /// Whether pieces of it must be looked for in archives before they can be read.
  template <class = Deferred>
  bool lies_in_archives() const {
    return std::any_of(pieces.begin(), pieces.end(), [](StoredPiece const& piece) { return piece.container_bytes != 0; });
  }
  /// Whether it becomes whatever float is asked for.
  bool decodes() const { return encoding != nullptr || of_encoded; }
  template <class = Deferred>
  std::string const& scheme() const { return encoding != nullptr ? encoding->scheme() : pieces.front().decoded->encoding->scheme(); }
};
struct Catalog {
  std::vector<CatalogFile> files;
  std::vector<CatalogTensor> tensors;                      // sorted by name
  std::vector<CatalogTensor> raw{};                        // what decoded tensors are made of, as it is stored; sorted by name
  std::vector<std::pair<std::string, Value>> values;       // sorted by name
  bool values_describe = false;                            // the tensors, rather than being state: a load need not want them
  std::vector<Tie> ties;                                   // sorted by dropped name
  std::vector<std::pair<std::string, NameJoints>> joints{};   // of names from nested states, where the format knows; sorted
  std::vector<std::string> duplicates;                     // pieces stored twice, in words
  std::vector<std::string> warnings;

  template <class = Deferred>
  CatalogTensor const* find_tensor(std::string_view name) const { return find_in(tensors, name); }
  template <class = Deferred>
  CatalogTensor const* find_raw(std::string_view name) const { return find_in(raw, name); }
  /// As it is stored, whether something is decoded from it or not.
  template <class = Deferred>
  CatalogTensor const* find_stored(std::string_view name) const {
    CatalogTensor const* const part = find_raw(name);
    return part != nullptr ? part : find_tensor(name);
  }
  template <class = Deferred>
  NameJoints joints_of(std::string_view name) const {
    auto const at = std::lower_bound(joints.begin(), joints.end(), name, [](auto const& entry, std::string_view wanted) { return entry.first < wanted; });
    return at != joints.end() && at->first == name ? at->second : NameJoints{};
  }
  template <class = Deferred>
  Value const* find_value(std::string_view name) const {
    auto const at = std::lower_bound(values.begin(), values.end(), name, [](auto const& v, std::string_view n) { return v.first < n; });
    return at != values.end() && at->first == name ? &at->second : nullptr;
  }
  /// The name under which `name` is stored: itself, or what it is tied to.
  template <class = Deferred>
  std::string const& stored_name(std::string const& name) const {
    auto const at = std::lower_bound(ties.begin(), ties.end(), name, [](Tie const& t, std::string const& n) { return t.dropped < n; });
    return at != ties.end() && at->dropped == name ? at->kept : name;
  }

 private:
  template <class = Deferred>
  static CatalogTensor const* find_in(std::vector<CatalogTensor> const& list, std::string_view name) {
    auto const at = std::lower_bound(list.begin(), list.end(), name, [](auto const& t, std::string_view n) { return t.name < n; });
    return at != list.end() && at->name == name ? &*at : nullptr;
  }
};

template <class = Deferred>
Bytes encode(FoundFile const& file) {
  ByteWriter out;
  out.text(file.path).number(file.size).number(file.version).number(file.pieces).number<std::uint64_t>(file.tensors.size());
  for (auto const& t : file.tensors) {
    out.text(t.name).number(t.dtype).number(t.offset).number(t.shape.rank());
    for (int d = 0; d < t.shape.rank(); ++d) out.number(t.shape[d]).number(t.origin[d]);
    out.block(t.content).number(t.container_bytes);
  }
  out.number<std::uint64_t>(file.ties.size());
  for (auto const& tie : file.ties) out.text(tie.dropped).text(tie.kept);
  out.number<std::uint64_t>(file.values.size());
  for (auto const& [name, value] : file.values) put(out.text(name), value);
  out.number<std::uint64_t>(file.joints.size());
  for (auto const& [name, joints] : file.joints) out.text(name).block(std::as_bytes(std::span{joints}));
  return out.take();
}
template <class = Deferred>
FoundFile decode_found_file(ConstByteSpan bytes) {
  ByteReader in{bytes};
  FoundFile file;
  file.path = in.text(), file.size = in.number<std::uint64_t>(), file.version = in.number<std::uint64_t>(), file.pieces = in.number<bool>();
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    FoundTensor& t = file.tensors.emplace_back();
    t.name = in.text(), t.dtype = in.number<DType>(), t.offset = in.number<std::uint64_t>();
    t.shape = t.origin = Extents::filled(std::clamp(in.number<int>(), 0, max_rank), 0);
    for (int d = 0; d < t.shape.rank(); ++d) t.shape[d] = in.number<std::int64_t>(), t.origin[d] = in.number<std::int64_t>();
    auto const content = in.block();
    t.content.assign(content.begin(), content.end());
    t.container_bytes = in.number<std::uint64_t>();
  }
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    Tie& tie = file.ties.emplace_back();
    tie.dropped = in.text(), tie.kept = in.text();
  }
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    std::string name = in.text();
    file.values.emplace_back(std::move(name), take_value(in));
  }
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    auto& [name, joints] = file.joints.emplace_back();
    name = in.text();
    auto const block = in.block();
    joints.resize(block.size() / sizeof(std::uint32_t));
    if (!joints.empty()) std::memcpy(joints.data(), block.data(), joints.size() * sizeof(std::uint32_t));
  }
  return file;
}

namespace detail {
template <class = Deferred>
std::string describe(DType dtype, Extents const& shape) { return to_string(shape) + ' ' + std::string{to_string(dtype)}; }

// Orders pieces, by their indices, so that equal boxes are equal.
struct ByBox {
  std::vector<StoredPiece> const* pieces;
  bool operator()(std::size_t a, std::size_t b) const {
    Box const &x = (*pieces)[a].box, &y = (*pieces)[b].box;
    auto const order = std::lexicographical_compare_three_way(x.origin.begin(), x.origin.end(), y.origin.begin(), y.origin.end());
    return order != 0 ? order < 0 : std::lexicographical_compare(x.shape.begin(), x.shape.end(), y.shape.begin(), y.shape.end());
  }
};

template <class = Deferred>
bool countable(Extents const& shape) {
  std::uint64_t product = 1;
  return std::all_of(shape.begin(), shape.end(), [&](std::int64_t size) {
    return checked_multiply(product, static_cast<std::uint64_t>(std::max<std::int64_t>(1, size)), product) && product <= INT64_MAX;
  });
}

// What is left of `box` without `hole`, as disjoint boxes.
template <class = Deferred>
void subtract(Box const& box, Box const& hole, std::vector<Box>& out) {
  Box common;
  if (!intersect(box, hole, common)) {
    out.push_back(box);
    return;
  }
  Box rest = box;
  for (int d = 0; d < box.rank(); ++d) {
    if (common.origin[d] > rest.origin[d]) {
      Box before = rest;
      before.shape[d] = common.origin[d] - rest.origin[d];
      out.push_back(before);
    }
    if (auto const end = rest.origin[d] + rest.shape[d], common_end = common.origin[d] + common.shape[d]; common_end < end) {
      Box after = rest;
      after.origin[d] = common_end;
      after.shape[d] = end - common_end;
      out.push_back(after);
    }
    rest.origin[d] = common.origin[d];
    rest.shape[d] = common.shape[d];
  }
}

// Whether any two of the boxes overlap: a sweep along the dimension of the largest extent, O(n log n) for the grids that jobs write.
template <class = Deferred>
bool any_overlap(std::vector<StoredPiece> const& pieces, Extents const& shape) {
  if (pieces.size() < 2) return false;
  if (shape.rank() == 0) return true;
  int widest = 0;
  std::int64_t most = -1;
  for (int d = 0; d < shape.rank(); ++d) {
    std::vector<std::int64_t> starts;
    for (auto const& piece : pieces) starts.push_back(piece.box.origin[d]);
    detail::sort(starts);
    auto const distinct = static_cast<std::int64_t>(std::unique(starts.begin(), starts.end()) - starts.begin());
    if (distinct > most) most = distinct, widest = d;
  }
  std::vector<StoredPiece const*> order;
  for (auto const& piece : pieces)
    if (!piece.box.empty()) order.push_back(&piece);
  std::sort(order.begin(), order.end(), [&](auto const* a, auto const* b) { return a->box.origin[widest] < b->box.origin[widest]; });
  std::vector<StoredPiece const*> open;
  for (auto const* piece : order) {
    std::erase_if(open, [&](auto const* other) { return other->box.origin[widest] + other->box.shape[widest] <= piece->box.origin[widest]; });
    Box common;
    for (auto const* other : open)
      if (intersect(piece->box, other->box, common)) return true;
    open.push_back(piece);
  }
  return false;
}
}  // namespace detail

/// Puts the tensors of all files together. A tensor's global shape is the smallest that contains its pieces, which is all that
/// formats of pieces say.
///
/// Rules     pieces of one tensor agree in dtype and rank, and cover it; of equal pieces the one in the lowest file name counts and
///           the others are listed; pieces that overlap otherwise are warned of and all kept, to be compared when read
/// Throws    Error(index_mismatch) for files that contradict each other, Error(incomplete), Error(overflow): all problems of all tensors
///           listed, the code that of the first
template <class = Deferred>
Catalog assemble(std::vector<FoundFile> found) {
  std::sort(found.begin(), found.end(), [](FoundFile const& a, FoundFile const& b) { return a.path < b.path; });
  struct Reference {
    FoundTensor const* tensor;
    std::uint32_t file;
  };
  Catalog catalog;
  std::vector<Reference> all;
  for (std::uint32_t f = 0; f < found.size(); ++f) {
    catalog.files.push_back({found[f].path, found[f].size, found[f].version});
    for (auto const& tensor : found[f].tensors) all.push_back({&tensor, f});
    detail::append(catalog.ties, found[f].ties);
  }
  auto const by_name = [](Reference const& a, Reference const& b) { return a.tensor->name < b.tensor->name; };
  if (!std::is_sorted(all.begin(), all.end(), by_name)) std::stable_sort(all.begin(), all.end(), by_name);
  catalog.tensors.reserve(all.size());
  detail::sort(catalog.ties);
  catalog.ties.erase(std::unique(catalog.ties.begin(), catalog.ties.end()), catalog.ties.end());
  Problems problems;
  auto const where = [&](Reference const& r) { return found[r.file].path; };
  for (std::size_t i = 0; i < all.size();) {
    FoundTensor const& first = *all[i].tensor;
    CatalogTensor tensor{first.name, first.dtype, Extents::filled(first.shape.rank(), 0), {}, {}};
    bool usable = true;
    std::set<std::size_t, detail::ByBox> distinct{detail::ByBox{&tensor.pieces}};   // a tensor may have as many pieces as a job has ranks
    std::size_t next = i;
    for (; next < all.size() && all[next].tensor->name == first.name; ++next) {
      FoundTensor const& piece = *all[next].tensor;
      if (piece.dtype != first.dtype) {
        problems.add(ErrorCode::index_mismatch, first.name + ": " + std::string{to_string(first.dtype)} + " in " + where(all[i]) + " and " + std::string{to_string(piece.dtype)} + " in " + where(all[next]));
        usable = false;
      } else if (piece.shape.rank() != first.shape.rank()) {
        problems.add(ErrorCode::index_mismatch, first.name + ": shape " + to_string(first.shape) + " in " + where(all[i]) + " and " + to_string(piece.shape) + " in " + where(all[next]));
        usable = false;
      } else if (next > i && !found[all[next].file].pieces && !found[all[i].file].pieces) {
        problems.add(ErrorCode::index_mismatch, first.name + ": stored whole in " + where(all[i]) + " and in " + where(all[next]));
        usable = false;
      } else {
        for (int d = 0; d < piece.shape.rank(); ++d) {
          std::uint64_t end = 0;
          if (!checked_add(static_cast<std::uint64_t>(piece.origin[d]), static_cast<std::uint64_t>(piece.shape[d]), end) || end > INT64_MAX) {
            problems.add(ErrorCode::overflow, first.name + ": a piece of " + std::to_string(piece.shape[d]) + " at " + std::to_string(piece.origin[d]) + " in " + where(all[next]));
            usable = false;
          } else {
            tensor.shape[d] = std::max(tensor.shape[d], static_cast<std::int64_t>(end));
          }
        }
        Box const box{piece.origin, piece.shape};
        tensor.pieces.push_back({all[next].file, piece.offset, box, piece.container_bytes, {}, {}});
        if (next == i && (i + 1 == all.size() || all[i + 1].tensor->name != first.name)) continue;   // the only piece, as most are
        if (auto const [same, fresh] = distinct.insert(tensor.pieces.size() - 1); !fresh) {
          // An empty piece holds nothing, so it may stand twice.
          if (!box.empty()) {
            catalog.duplicates.push_back(first.name + " " + to_string(box) + ": in " + catalog.files[tensor.pieces[*same].file].path + " (used) and in " + where(all[next]));
            tensor.copies.push_back(tensor.pieces.back());
          }
          tensor.pieces.pop_back();
        }
      }
    }
    if (usable && !detail::countable(tensor.shape)) {
      problems.add(ErrorCode::overflow, first.name + ": its pieces reach to " + to_string(tensor.shape) + ", more elements than fit into 63 bits");
      usable = false;
    }
    if (usable && next - i > 1 && !tensor.pieces.empty()) {
      std::erase_if(tensor.pieces, [&](StoredPiece const& p) { return p.box.empty() && tensor.pieces.size() > 1; });
      std::int64_t const volume = tensor.shape.elements();
      std::int64_t stored = 0;
      if (!detail::any_overlap(tensor.pieces, tensor.shape)) {
        for (auto const& piece : tensor.pieces) stored += piece.box.shape.elements();
      } else {
        std::vector<Box> missing{Box::whole(tensor.shape)}, rest;
        for (auto piece_at = tensor.pieces.begin(); piece_at != tensor.pieces.end(); ++piece_at) {
          StoredPiece const& piece = *piece_at;
          Box common;
          auto const met = std::find_if(tensor.pieces.begin(), piece_at, [&](StoredPiece const& p) { return intersect(p.box, piece.box, common); });
          if (met != piece_at)
            catalog.warnings.push_back(first.name + " " + to_string(common) + " is stored twice: as part of " + to_string(met->box) + " in " + catalog.files[met->file].path + " (used), and of " + to_string(piece.box) + " in " + catalog.files[piece.file].path);
          rest.clear();
          for (auto const& box : missing) detail::subtract(box, piece.box, rest);
          std::swap(missing, rest);
        }
        stored = volume;
        for (auto const& box : missing) stored -= box.shape.elements();
      }
      if (stored != volume) problems.add(ErrorCode::incomplete, first.name + ": its pieces hold " + std::to_string(stored) + " of the " + std::to_string(volume) + " elements of " + to_string(tensor.shape));
    } else if (usable && next - i == 1 && !tensor.pieces.empty() && tensor.pieces[0].box.shape.elements() != tensor.shape.elements()) {
      problems.add(ErrorCode::incomplete, first.name + ": its only piece is " + to_string(tensor.pieces[0].box) + " of " + to_string(tensor.shape));
    }
    if (usable) catalog.tensors.push_back(std::move(tensor));
    i = next;
  }
  problems.raise();
  return catalog;
}

}  // namespace dcp

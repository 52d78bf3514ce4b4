// SPDX-License-Identifier: Apache-2.0
#pragma once
// Device meshes: ranks arranged in a grid. Geometry only: no communication, so that layouts are testable without a launcher.

#include <dcp/base/error.hpp>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace dcp {

/// The most axes a mesh may have.
inline constexpr int max_axes = 6;

/// A mesh as a value: the rank at a coordinate is base + sum of coordinate[a] * strides[a]. Every sub-mesh of a mesh has that form.
struct MeshGeometry {
  int axes = 0;
  std::int64_t world = 0;   // ranks of the communicator that the mesh was made for
  std::int64_t base = 0;
  std::array<std::int64_t, max_axes> extents{}, strides{};

  using Coordinate = std::array<std::int64_t, max_axes>;

  constexpr std::int64_t size() const {
    std::int64_t product = 1;
    for (int a = 0; a < axes; ++a) product *= extents[static_cast<std::size_t>(a)];
    return product;
  }
  constexpr std::int64_t rank_at(Coordinate const& coordinate) const {
    std::int64_t rank = base;
    for (int a = 0; a < axes; ++a) rank += coordinate[static_cast<std::size_t>(a)] * strides[static_cast<std::size_t>(a)];
    return rank;
  }
  /// Where `rank` stands; nothing if it is not one of the mesh's ranks.
  constexpr std::optional<Coordinate> coordinate_of(std::int64_t rank) const {
    // Strides are mixed-radix weights of the full mesh, so the axes can be peeled off in order of falling stride.
    Coordinate coordinate{};
    std::array<bool, max_axes> done{};
    std::int64_t rest = rank - base;
    for (int step = 0; step < axes; ++step) {
      int largest = -1;
      for (int a = 0; a < axes; ++a)
        if (!done[static_cast<std::size_t>(a)] && (largest < 0 || strides[static_cast<std::size_t>(a)] > strides[static_cast<std::size_t>(largest)])) largest = a;
      auto const a = static_cast<std::size_t>(largest);
      done[a] = true;
      if (extents[a] == 1) continue;
      if (rest < 0) return std::nullopt;
      coordinate[a] = rest / strides[a];
      if (coordinate[a] >= extents[a]) return std::nullopt;
      rest -= coordinate[a] * strides[a];
    }
    if (rest != 0) return std::nullopt;
    return coordinate;
  }
  friend constexpr bool operator==(MeshGeometry const&, MeshGeometry const&) = default;
};

namespace detail {
template <int Given, int Axes>
struct one_extent_per_axis {
  static_assert(Given == Axes, "dcp: a DeviceMesh takes one extent per axis; list as many extents as it has axes [extents given == mesh axes]");
};
template <int Axes>
struct axes_in_range {
  static_assert(Axes >= 0, "dcp: a DeviceMesh has 0 to 6 axes [axes >= 0]");
  static_assert(Axes <= max_axes, "dcp: a DeviceMesh has 0 to 6 axes; make one axis of those that no tensor tells apart [axes <= 6]");
};
template <int Axis, int Axes>
struct axis_of_mesh {
  static_assert(Axis >= 0, "dcp: sub<...> counts axes from 0; negative numbers do not count from the end here [axis >= 0]");
  static_assert(Axis < Axes, "dcp: sub<...> names an axis this mesh does not have; axes count from 0 [axis < mesh axes]");
};
template <int Named, int Distinct>
struct axes_named_once {
  static_assert(Named == Distinct, "dcp: sub<...> names an axis twice; name each axis to keep once [axes named == distinct axes]");
};
template <class Ranks>
inline constexpr bool has_ranks = requires(Ranks const& ranks) {   // no concept: compilers would explain it at length
  static_cast<std::int64_t>(ranks.rank());
  static_cast<std::int64_t>(ranks.size());
};
template <class Ranks>
struct mesh_of_ranks {
  static_assert(has_ranks<Ranks>, "dcp: a DeviceMesh is made from something with  rank()  and  size() , such as a communicator; this type lacks one of them");
};
template <class Ranks>
constexpr std::int64_t rank_in(Ranks const& ranks) {
  [[maybe_unused]] mesh_of_ranks<Ranks> check;
  if constexpr (has_ranks<Ranks>) return static_cast<std::int64_t>(ranks.rank());
  else return 0;
}
template <class Ranks>
constexpr std::int64_t size_of(Ranks const& ranks) {
  if constexpr (has_ranks<Ranks>) return static_cast<std::int64_t>(ranks.size());
  else return 0;
}
// A size even where the axes are wrong, so that the sentence about them is all there is to read.
constexpr std::size_t axes_beside(int axes, std::size_t named) { return axes > 0 && static_cast<std::size_t>(axes) > named ? static_cast<std::size_t>(axes) - named : 0; }
}  // namespace detail

/// `N` axes of ranks and the place of this rank among them. Last axis fastest: rank = (i * extent(1) + j) * extent(2) + k.
///
/// Takes     anything with rank() and size(), such as a communicator; nothing of it is kept
/// Throws    Error(invalid_argument) unless the extents multiply to size()
/// Example   dcp::DeviceMesh<2> mesh{world, {8, 4}};   // 8 data-parallel times 4 tensor-parallel ranks
template <int N>
class DeviceMesh : detail::axes_in_range<N> {
 public:
  using Coordinate = std::array<std::int64_t, detail::axes_beside(N, 0)>;
  static constexpr int axes = N;

  template <class Ranks, std::size_t K>
  constexpr DeviceMesh(Ranks const& ranks, std::int64_t const (&extents)[K]) : DeviceMesh{detail::rank_in(ranks), detail::size_of(ranks), checked(extents)} {
    [[maybe_unused]] detail::one_extent_per_axis<static_cast<int>(K), N> axes_and_extents;
  }
  template <class Ranks>
  constexpr DeviceMesh(Ranks const& ranks, Coordinate const& extents) : DeviceMesh{detail::rank_in(ranks), detail::size_of(ranks), extents} {}

  constexpr std::int64_t extent(int axis) const { return geometry_.extents[static_cast<std::size_t>(axis)]; }
  constexpr std::int64_t size() const { return geometry_.size(); }
  /// This rank, as the communicator counts.
  constexpr std::int64_t rank() const { return rank_; }
  /// Whether this rank is one of the mesh.
  constexpr bool contains_this_rank() const { return coordinate_.has_value(); }
  /// This rank's place; nothing on a rank outside the mesh.
  constexpr std::optional<Coordinate> coordinate() const { return coordinate_; }
  /// The communicator's rank at a place.
  constexpr std::int64_t rank_at(Coordinate const& coordinate) const {
    std::int64_t rank = geometry_.base;
    for (std::size_t a = 0; a < N; ++a) rank += coordinate[a] * geometry_.strides[a];
    return rank;
  }
  /// The communicator's ranks that the mesh consists of, last axis fastest.
  std::vector<std::int64_t> ranks() const {
    std::vector<std::int64_t> result;
    result.reserve(static_cast<std::size_t>(size()));
    for (std::int64_t i = 0; i < size(); ++i) {
      std::int64_t rest = i;
      Coordinate at{};
      for (int a = N; a-- > 0; rest /= extent(a)) at[static_cast<std::size_t>(a)] = rest % extent(a);
      result.push_back(rank_at(at));
    }
    return result;
  }

  /// The mesh of a part of the axes, in the order named, through this rank: the other coordinates are this rank's. On a rank
  /// that is not in the mesh: through the mesh's first rank.
  ///
  /// Example   mesh of {pp, dp, tp}: mesh.sub<1, 2>() is the (dp, tp) mesh of this rank's pipeline stage
  template <int... Axis>
  constexpr DeviceMesh<static_cast<int>(sizeof...(Axis))> sub() const {
    std::array<std::int64_t, detail::axes_beside(N, sizeof...(Axis))> fixed{};
    if (coordinate_)
      for (std::size_t a = 0, next = 0; a < N; ++a)
        if (((static_cast<std::size_t>(Axis) != a) && ...)) fixed[next++] = (*coordinate_)[a];
    return sub<Axis...>(fixed);
  }
  /// The same with the other coordinates given, in axis order. Ranks that do not have them are outside the sub-mesh.
  ///
  /// Example   mesh.sub<1, 2>({3}): the (dp, tp) mesh of pipeline stage 3, the same value on every rank
  /// Throws    Error(invalid_argument) if a coordinate is outside its axis
  template <int... Axis>
  constexpr DeviceMesh<static_cast<int>(sizeof...(Axis))> sub(std::array<std::int64_t, detail::axes_beside(N, sizeof...(Axis))> const& others) const {
    (static_cast<void>(detail::axis_of_mesh<Axis, N>{}), ...);
    constexpr int distinct = [] {   // of whatever was named: an axis that the mesh lacks is one mistake, not two
      int count = 0;
      std::array<int, sizeof...(Axis)> const named{Axis...};
      for (std::size_t i = 0; i < named.size(); ++i) {
        bool before = false;
        for (std::size_t j = 0; j < i; ++j) before = before || named[j] == named[i];
        count += before ? 0 : 1;
      }
      return count;
    }();
    static_cast<void>(detail::axes_named_once<static_cast<int>(sizeof...(Axis)), distinct>{});
    MeshGeometry part;
    part.world = geometry_.world;
    part.base = geometry_.base;
    for (std::size_t a = 0, next = 0; a < N; ++a) {
      if (((static_cast<std::size_t>(Axis) == a) || ...)) continue;
      auto const at = others[next++];
      if (at < 0 || at >= geometry_.extents[a])
        throw Error{ErrorCode::invalid_argument, "coordinate " + std::to_string(at) + " on mesh axis " + std::to_string(a) + " of extent " + std::to_string(geometry_.extents[a])};
      part.base += at * geometry_.strides[a];
    }
    [[maybe_unused]] auto const keep = [&](std::size_t a) {   // unused where no axis is named
      auto const next = static_cast<std::size_t>(part.axes++);
      part.extents[next] = geometry_.extents[a];
      part.strides[next] = geometry_.strides[a];
    };
    (keep(static_cast<std::size_t>(Axis)), ...);
    return DeviceMesh<static_cast<int>(sizeof...(Axis))>{part, rank_};
  }

  constexpr MeshGeometry const& geometry() const { return geometry_; }

 private:
  template <int>
  friend class DeviceMesh;

  template <std::size_t K>
  static constexpr Coordinate checked(std::int64_t const (&extents)[K]) {
    Coordinate list{};
    for (std::size_t a = 0; a < K && a < static_cast<std::size_t>(N); ++a) list[a] = extents[a];
    return list;
  }
  constexpr DeviceMesh(std::int64_t rank, std::int64_t size, Coordinate const& extents) : rank_{rank} {
    geometry_.axes = N;
    geometry_.world = size;
    std::int64_t stride = 1;
    for (std::size_t a = N; a-- > 0;) {
      if (extents[a] < 1) throw Error{ErrorCode::invalid_argument, "mesh axis " + std::to_string(a) + " has extent " + std::to_string(extents[a])};
      geometry_.extents[a] = extents[a];
      geometry_.strides[a] = stride;
      if (__builtin_mul_overflow(stride, extents[a], &stride)) throw Error{ErrorCode::overflow, "the number of ranks of a mesh does not fit into 63 bits"};
    }
    if (stride != size) {
      std::string list;
      for (auto const extent : extents) list += (list.empty() ? "" : " x ") + std::to_string(extent);
      throw Error{ErrorCode::invalid_argument, "a mesh of " + list + " = " + std::to_string(stride) + " ranks on a communicator of " + std::to_string(size)};
    }
    locate();
  }
  constexpr DeviceMesh(MeshGeometry const& geometry, std::int64_t rank) : geometry_{geometry}, rank_{rank} { locate(); }
  constexpr void locate() {
    if (auto const found = geometry_.coordinate_of(rank_)) {
      Coordinate mine{};
      for (std::size_t a = 0; a < N; ++a) mine[a] = (*found)[a];
      coordinate_ = mine;
    }
  }

  MeshGeometry geometry_;
  std::int64_t rank_ = 0;
  std::optional<Coordinate> coordinate_;
};

}  // namespace dcp

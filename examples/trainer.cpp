// SPDX-License-Identifier: Apache-2.0
// needs: mpi eigen
// options: -ffp-contract=off
// test: {mpirun 4} --mesh 2x2 --steps 3 --save-every 1 --checkpoint {tmp}/run {source}/README.md {source}/LICENSE
// test: {mpirun 3} --mesh 1x3 --steps 2 --fast-sums {source}/README.md
// test: {mpirun 2} {sigterm 2} --mesh 1x2 --steps 1000000 --save-every 2 --checkpoint {tmp}/run {source}/README.md
//
// A byte-level language model, trained on real text: from the last 16 bytes it predicts the next one.
//
//   mpirun -np 4 trainer --mesh 2x2 --steps 100 --save-every 10 --checkpoint run book.txt another.txt
//
// The ranks form a mesh of a data-parallel and a tensor-parallel axis (dp x tp). The hidden layer is cut over tp; each parameter and
// its optimizer state are cut over dp as well (FSDP). Saves happen in the background, one directory below `run` for each, and training
// goes on from the newest of them, on any mesh whose two extents divide 12: the sums below have the same order on each, so the losses
// and the weights have the same bits. SIGTERM, to any one of the ranks, ends the run after one more save.
//
// That is not free, because a floating-point sum depends on its order, and so does a matrix product on its shape:
//   - the work is cut into 12 micro-batches x 12 slices of the hidden layer, whatever the number of ranks. Each unit is a matrix
//     product of the same shape, on buffers of its own (a product that is split in another way has other bits);
//   - a rank never adds up its own units first. They travel one by one, and who needs the sum adds them in the order of the units: 6
//     times the bytes of an all-reduce along tp, 12 / dp times those of a reduce-scatter along dp. Measured with 4 ranks on
//     the 2 processors of one machine, a step takes half as long again (0.18 s, not 0.12 s);
//   - the compiler must not rearrange (no -ffast-math, and -ffp-contract=off), and all ranks must run the same binary on the same kind
//     of processor: Eigen chooses its blocks by the size of the caches, and other instructions by -march.
// --fast-sums adds up locally and lets MPI reduce the rest, as trainers usually do: less traffic, other bits on every mesh.
#include <dcp/dcp.hpp>
#include <dcp/comm/mpi.hpp>

#include <Eigen/Core>
#include <mpi.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#ifdef __FAST_MATH__
#error "-ffast-math lets the compiler reorder sums; this program promises their order"
#endif

using namespace std::chrono_literals;

namespace {

// ---- layout: what each parameter is, and how it is cut --------------------------------------------------------------------------

using Mesh = dcp::Axes<struct dp, struct tp>;
using HiddenRows = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::OrderedShard<0, 0>>, dcp::On<dp, dcp::OrderedShard<0, 1>>>;   // tp cuts first, FSDP within
using HiddenColumns = dcp::PlacementOn<Mesh, dcp::On<tp, dcp::Shard<1>>, dcp::On<dp, dcp::Shard<0>>>;
using Rows = dcp::PlacementOn<Mesh, dcp::On<dp, dcp::Shard<0>>>;                                                         // the same along tp

constexpr int window = 16, width = 32, inputs = window * width;          // bytes seen, numbers per byte
constexpr int slices = 12, slice = 192, hidden = slices * slice;         // units of tensor parallelism
constexpr int batches = 12, examples = 32;                               // units of data parallelism, and their size
constexpr int bytes = 256;

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowVector = Eigen::RowVectorXf;

/// The ranks along one axis of the mesh.
class Axis {
 public:
  Axis(dcp::DeviceMesh<2> const& mesh, int axis) : size{static_cast<int>(mesh.extent(axis))} {
    auto const here = *mesh.coordinate();
    rank = static_cast<int>(here[static_cast<std::size_t>(axis)]);
    MPI_Comm_split(MPI_COMM_WORLD, static_cast<int>(here[static_cast<std::size_t>(1 - axis)]), rank, &comm);
  }
  Axis(Axis const&) = delete;
  Axis& operator=(Axis const&) = delete;
  ~Axis() { MPI_Comm_free(&comm); }

  MPI_Comm comm = MPI_COMM_NULL;
  int rank = 0, size;
};

/// A number in [-1, 1) that depends on nothing but its arguments.
float uniform(std::uint64_t stream, std::uint64_t index) {
  std::uint64_t x = (stream << 40) + index + 0x9e3779b97f4a7c15u;        // splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return static_cast<float>(static_cast<std::int64_t>(x >> 40)) * 0x1p-23f - 1.0f;
}

/// One parameter: this rank's part of the weights and of Adam's two moments, and what a step needs besides.
template <class Placement>
struct Parameter {
  std::vector<float> weight_memory, first_memory, second_memory;         // owned here, viewed by the tensors
  dcp::ShardedTensor<float, Placement> weight, first, second;
  std::vector<float> gradient;                                           // of this rank's part
  std::vector<int> counts, offsets;                                      // the parts of the ranks along dp, in elements
  Matrix whole;                                                          // all that the ranks along dp hold together, weights ...
  Matrix partial;                                                        // ... and the gradient of one micro-batch

  Parameter(dcp::DeviceMesh<2> const& mesh, dcp::Extents const& shape, std::uint64_t stream, float scale)
      : weight_memory(dcp::local_box<Placement>(mesh, shape).size()),
        first_memory(weight_memory.size()),
        second_memory(weight_memory.size()),
        weight{mesh, shape, weight_memory},
        first{mesh, shape, first_memory},
        second{mesh, shape, second_memory},
        gradient(weight_memory.size()) {
    // The same start on every mesh: each weight depends on where it lies in the whole parameter.
    dcp::Box const box = weight.local_box();
    bool const matrix = shape.rank() == 2;
    std::int64_t const columns = matrix ? shape[1] : 1, left = matrix ? box.origin[1] : 0, across = matrix ? box.shape[1] : 1;
    for (std::size_t i = 0; i < weight_memory.size(); ++i) {
      std::int64_t const at = static_cast<std::int64_t>(i), row = box.origin[0] + at / across, column = left + at % across;
      weight_memory[i] = scale * uniform(stream, static_cast<std::uint64_t>(row * columns + column));
    }
    // What the others along dp hold follows from the layout, without asking them.
    auto const tensor_parallel = (*mesh.coordinate())[1];
    int total = 0;
    for (std::int64_t i = 0; i < mesh.extent(0); ++i) {
      auto const part = dcp::box_of_rank(weight.layout(), mesh.rank_at({i, tensor_parallel}));
      offsets.push_back(total);
      counts.push_back(static_cast<int>(part->size()));
      total += counts.back();
    }
    whole.resize(total / across, across);
    partial.resize(whole.rows(), whole.cols());
  }
  Parameter(Parameter const&) = delete;                                  // tensors view the memory of this object
  Parameter& operator=(Parameter const&) = delete;

  void gather_along(Axis const& data) {
    auto const mine = static_cast<int>(weight_memory.size());
    MPI_Allgatherv(weight_memory.data(), mine, MPI_FLOAT, whole.data(), counts.data(), offsets.data(), MPI_FLOAT, data.comm);
  }

  /// Each rank along dp has the gradient of one micro-batch in `partial`, the ranks in the order of the micro-batches. Everyone
  /// gets its part of each, and adds them in that order.
  void add_in_order(Axis const& data) {
    std::size_t const mine = gradient.size();
    std::vector<float> units(mine * static_cast<std::size_t>(data.size));
    std::vector<int> const receive(counts.size(), static_cast<int>(mine));
    std::vector<int> places(counts.size());
    for (std::size_t i = 0; i < places.size(); ++i) places[i] = static_cast<int>(i * mine);
    MPI_Alltoallv(partial.data(), counts.data(), offsets.data(), MPI_FLOAT, units.data(), receive.data(), places.data(), MPI_FLOAT, data.comm);
    for (std::size_t unit = 0; unit < places.size(); ++unit)
      for (std::size_t i = 0; i < mine; ++i) gradient[i] += units[unit * mine + i];
  }
  void add_fast(Axis const& data) { MPI_Reduce_scatter(partial.data(), gradient.data(), counts.data(), MPI_FLOAT, MPI_SUM, data.comm); }
};

struct Model {
  Parameter<Rows> embedding;           // [bytes, width]
  Parameter<HiddenRows> up;            // [hidden, inputs]
  Parameter<HiddenRows> up_bias;       // [hidden]
  Parameter<HiddenColumns> down;       // [bytes, hidden]
  Parameter<Rows> down_bias;           // [bytes]

  explicit Model(dcp::DeviceMesh<2> const& mesh)
      : embedding{mesh, {bytes, width}, 1, 1.0f},
        up{mesh, {hidden, inputs}, 2, std::sqrt(3.0f / inputs)},
        up_bias{mesh, {hidden}, 3, 0.0f},
        down{mesh, {bytes, hidden}, 4, std::sqrt(1.0f / hidden)},
        down_bias{mesh, {bytes}, 5, 0.0f} {}

  void each(auto visit) {
    visit("embedding.weight", embedding);
    visit("up.weight", up);
    visit("up.bias", up_bias);
    visit("down.weight", down);
    visit("down.bias", down_bias);
  }
  dcp::StateDict state() {
    dcp::StateDict state;
    each([&](char const* name, auto& parameter) { state.add(name, parameter.weight); });
    return state;
  }
};

struct Adam {
  Model& model;
  std::int64_t updates = 0;

  void update() {
    constexpr double beta1 = 0.9, beta2 = 0.99, rate = 0.002;
    ++updates;
    auto const correction1 = static_cast<float>(1.0 / (1.0 - std::pow(beta1, static_cast<double>(updates))));
    auto const correction2 = static_cast<float>(1.0 / (1.0 - std::pow(beta2, static_cast<double>(updates))));
    constexpr auto b1 = static_cast<float>(beta1), b2 = static_cast<float>(beta2), lr = static_cast<float>(rate);
    model.each([&](char const*, auto& p) {
      for (std::size_t i = 0; i < p.gradient.size(); ++i) {              // element by element: a shard is updated as the whole would be
        float const g = p.gradient[i];
        float& m = p.first_memory[i] = b1 * p.first_memory[i] + (1.0f - b1) * g;
        float& v = p.second_memory[i] = b2 * p.second_memory[i] + (1.0f - b2) * (g * g);
        p.weight_memory[i] -= lr * (m * correction1) / (std::sqrt(v * correction2) + 1e-8f);
      }
    });
  }
  dcp::StateDict state() {
    dcp::StateDict state{{"updates", updates}};
    model.each([&](std::string name, auto& p) {
      state.add(name + ".exp_avg", p.first);
      state.add(name + ".exp_avg_sq", p.second);
    });
    return state;
  }
};

// ---- data: examples drawn from a text ---------------------------------------------------------------------------------------------

/// Draws examples one after another. Its place is part of the checkpoint; so is what text it draws from.
struct Data {
  std::string text;
  std::int64_t drawn = 0, size = 0;
  std::uint64_t checksum = 0;

  explicit Data(std::vector<std::filesystem::path> const& files) {
    for (auto const& file : files) {
      std::ifstream in{file, std::ios::binary};
      if (!in) throw std::runtime_error("cannot read " + file.string());
      text.append(std::istreambuf_iterator<char>{in}, {});
    }
    if (text.size() <= window) throw std::runtime_error("the text is too short");
    size = static_cast<std::int64_t>(text.size());
    checksum = checksum_of(text);
  }
  /// Where example `index` of the whole run begins.
  std::uint8_t const* example(std::int64_t index) const {
    auto const places = static_cast<std::uint64_t>(text.size()) - window;
    std::uint64_t x = (static_cast<std::uint64_t>(index) + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return reinterpret_cast<std::uint8_t const*>(text.data()) + (x ^ (x >> 31)) % places;
  }
  dcp::StateDict state() { return {{"drawn", drawn}, {"size", size}, {"checksum", checksum}}; }
  void after_load() const {            // called by load, when everything is in place
    if (static_cast<std::size_t>(size) != text.size() || checksum != checksum_of(text))
      throw dcp::Error{dcp::ErrorCode::invalid_argument, "this is not the text that the checkpoint was trained on"};
  }

 private:
  static std::uint64_t checksum_of(std::string const& text) { return dcp::crc64(std::as_bytes(std::span{text})); }
};

// ---- training: forward and backward, unit by unit ---------------------------------------------------------------------------------

volatile std::sig_atomic_t told_to_stop = 0;   // by SIGTERM

class Trainer {
 public:
  Trainer(dcp::DeviceMesh<2> const& mesh, Model& model, Adam& adam, Data& data, bool fast_sums)
      : mesh_{mesh}, data_axis_{mesh, 0}, tensor_axis_{mesh, 1}, own_slices_{slices / tensor_axis_.size}, model_{model}, adam_{adam}, data_{data}, fast_{fast_sums} {
    if (batches % data_axis_.size != 0 || slices % tensor_axis_.size != 0) throw std::runtime_error("both extents of the mesh must divide 12");
  }

  struct Step {
    double loss;                       // the mean of its 12 micro-batches
    bool stop;                         // some rank was told to
  };
  /// One step of the optimizer. A rank that was told to stop must not do so alone, as the others would wait for it for ever: who was told
  /// travels with the losses, and all ranks come to the same conclusion.
  Step step() {
    model_.each([&](char const*, auto& p) {
      p.gather_along(data_axis_);
      std::ranges::fill(p.gradient, 0.0f);
    });
    up_.clear(), down_.clear();
    for (int s = 0; s < own_slices_; ++s) {
      up_.push_back(model_.up.whole.middleRows(s * slice, slice));
      down_.push_back(model_.down.whole.middleCols(s * slice, slice));
    }

    // In each round the ranks along dp take one micro-batch each, in order.
    int const rounds = batches / data_axis_.size;
    std::vector<double> mine;          // losses, then whether to stop
    for (int round = 0; round < rounds; ++round) {
      if (!fast_ || round == 0) model_.each([](char const*, auto& p) { p.partial.setZero(); });
      mine.push_back(micro_batch(round * data_axis_.size + data_axis_.rank));
      if (!fast_) model_.each([&](char const*, auto& p) { p.add_in_order(data_axis_); });
    }
    if (fast_) model_.each([&](char const*, auto& p) { p.add_fast(data_axis_); });

    adam_.update();
    data_.drawn += batches * examples;

    mine.push_back(told_to_stop);
    Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> all(mesh_.size(), rounds + 1);   // a row for each rank
    MPI_Allgather(mine.data(), rounds + 1, MPI_DOUBLE, all.data(), rounds + 1, MPI_DOUBLE, MPI_COMM_WORLD);
    double loss = 0;
    for (int round = 0; round < rounds; ++round)
      for (std::int64_t i = 0; i < data_axis_.size; ++i) loss += all(mesh_.rank_at({i, 0}), round);
    return {loss / batches, (all.col(rounds).array() != 0).any()};
  }

 private:
  /// Adds the gradients of one micro-batch, of this rank's slices of the hidden layer, to what is in `partial`; returns its loss.
  double micro_batch(int batch) {
    std::vector<std::uint8_t const*> text;
    for (int i = 0; i < examples; ++i) text.push_back(data_.example(data_.drawn + batch * examples + i));

    Matrix x(examples, inputs);
    for (int i = 0; i < examples; ++i)
      for (int k = 0; k < window; ++k) x.block(i, k * width, 1, width) = model_.embedding.whole.row(text[static_cast<std::size_t>(i)][k]);

    std::vector<Matrix> h;
    Matrix units(own_slices_, examples * bytes), unit(examples, bytes);
    for (int s = 0; s < own_slices_; ++s) {
      auto const at = static_cast<std::size_t>(s);
      Matrix a(examples, slice);
      a.noalias() = x * up_[at].transpose();
      a.rowwise() += RowVector{model_.up_bias.whole.col(0).segment(s * slice, slice).transpose()};
      h.push_back(a.array().tanh().matrix());
      unit.noalias() = h.back() * down_[at].transpose();
      units.row(s) = unit.reshaped<Eigen::RowMajor>().transpose();
    }
    Matrix logits = sum_over_slices(units).reshaped<Eigen::RowMajor>(examples, bytes);
    logits.rowwise() += RowVector{model_.down_bias.whole.col(0).transpose()};

    // Cross entropy, and its gradient in place of the logits.
    double loss = 0;
    for (int i = 0; i < examples; ++i) {
      int const target = text[static_cast<std::size_t>(i)][window];
      RowVector e = (logits.row(i).array() - logits.row(i).maxCoeff()).exp();
      e /= e.sum();
      loss -= static_cast<double>(std::log(e(target)));
      e(target) -= 1.0f;
      logits.row(i) = e / static_cast<float>(examples * batches);
    }
    model_.down_bias.partial.col(0) += RowVector{logits.colwise().sum()}.transpose();

    Matrix embedding_units = Matrix::Zero(own_slices_, bytes * width);
    for (int s = 0; s < own_slices_; ++s) {
      auto const at = static_cast<std::size_t>(s);
      Matrix down_gradient(bytes, slice), dh(examples, slice), up_gradient(slice, inputs), dx(examples, inputs);
      down_gradient.noalias() = logits.transpose() * h[at];
      dh.noalias() = logits * down_[at];
      dh.array() *= 1.0f - h[at].array().square();
      up_gradient.noalias() = dh.transpose() * x;
      dx.noalias() = dh * up_[at];
      model_.down.partial.middleCols(s * slice, slice) += down_gradient;
      model_.up.partial.middleRows(s * slice, slice) += up_gradient;
      model_.up_bias.partial.col(0).segment(s * slice, slice) += RowVector{dh.colwise().sum()}.transpose();
      for (int i = 0; i < examples; ++i)
        for (int k = 0; k < window; ++k) embedding_units.block(s, text[static_cast<std::size_t>(i)][k] * width, 1, width) += dx.block(i, k * width, 1, width);
    }
    model_.embedding.partial += sum_over_slices(embedding_units).reshaped<Eigen::RowMajor>(bytes, width);
    return loss / examples;
  }

  /// The sum over all 12 slices of the hidden layer, of which each rank along tp has some, one in each row.
  RowVector sum_over_slices(Matrix const& mine) const {
    auto const length = static_cast<int>(mine.cols());
    RowVector sum = RowVector::Zero(length);
    if (fast_) {
      for (int s = 0; s < own_slices_; ++s) sum += mine.row(s);
      MPI_Allreduce(MPI_IN_PLACE, sum.data(), length, MPI_FLOAT, MPI_SUM, tensor_axis_.comm);
    } else {
      Matrix all(slices, length);
      MPI_Allgather(mine.data(), own_slices_ * length, MPI_FLOAT, all.data(), own_slices_ * length, MPI_FLOAT, tensor_axis_.comm);
      for (int s = 0; s < slices; ++s) sum += all.row(s);
    }
    return sum;
  }

  dcp::DeviceMesh<2> const& mesh_;
  Axis data_axis_, tensor_axis_;
  int own_slices_;
  Model& model_;
  Adam& adam_;
  Data& data_;
  bool fast_;
  std::vector<Matrix> up_, down_;      // this rank's slices, each in a buffer of its own
};

// ---- the program --------------------------------------------------------------------------------------------------------------------

struct Options {
  std::vector<std::filesystem::path> files;
  std::filesystem::path checkpoint;      // the directory of the run: a checkpoint of each save below it
  std::int64_t steps = 100, save_every = 0;
  std::array<std::int64_t, 2> mesh{};
  bool fast_sums = false;
};

/// The repository's own documents: what is learned from when no file is named.
std::vector<std::filesystem::path> own_documents() {
  auto const root = std::filesystem::path{__FILE__}.parent_path().parent_path();
  std::vector<std::filesystem::path> files;
  for (auto const& entry : std::filesystem::recursive_directory_iterator{root / "include"})
    if (entry.path().extension() == ".hpp") files.push_back(entry.path());
  for (auto const* name : {"README.md", "LICENSE"})
    if (std::filesystem::exists(root / name)) files.push_back(root / name);
  std::ranges::sort(files);
  return files;
}

Options parse(int argc, char** argv, int ranks) {
  Options options;
  options.mesh = {ranks, 1};
  for (int i = 1; i < argc; ++i) {
    std::string_view const word = argv[i];
    auto const value = [&] {
      if (++i == argc) throw std::runtime_error(std::string{word} + " takes a value");
      return std::string{argv[i]};
    };
    if (word == "--steps") options.steps = std::stoll(value());
    else if (word == "--save-every") options.save_every = std::stoll(value());
    else if (word == "--checkpoint") options.checkpoint = value();
    else if (word == "--fast-sums") options.fast_sums = true;
    else if (word == "--mesh") {
      std::string const text = value();
      options.mesh = {std::stoll(text), std::stoll(text.substr(text.find('x') + 1))};
    } else if (word.starts_with("-")) throw std::runtime_error("unknown option " + std::string{word});
    else options.files.emplace_back(word);
  }
  if (options.files.empty()) options.files = own_documents();
  return options;
}

/// Whether all that is to be saved is.
bool train(Options const& options, dcp::MpiComm& world) {
  dcp::DeviceMesh<2> mesh{world, options.mesh};
  Model model{mesh};
  Adam adam{model};
  Data data{options.files};
  Trainer trainer{mesh, model, adam, data, options.fast_sums};
  std::int64_t step = 0;
  bool const speaks = world.rank() == 0;

  // All that the run consists of. The views know where each rank's part lies, so this is said once, for any mesh.
  dcp::StateDict const state{{"model", model}, {"optimizer", adam}, {"data", data}, {"step", step}};
  dcp::SafeTensorsOptions const storage{.groups = {{"model", ".", dcp::Prefix::strip}, {"optimizer", "optimizer"}}};

  std::optional<dcp::CheckpointManager<dcp::SafeTensors>> checkpoints;
  if (!options.checkpoint.empty()) {
    checkpoints.emplace(world, options.checkpoint, dcp::ManagerOptions<dcp::SafeTensors>{.keep_last = 2, .save = {.storage = storage}, .load = {.storage = storage}});
    if (auto const last = checkpoints->latest()) {
      auto const report = checkpoints->load(*last, state);
      if (speaks) std::cout << report << '\n';
    }
  }
  if (speaks)
    std::cout << "training from step " << step << " on " << world.size() << " ranks, mesh " << mesh.extent(0) << " x " << mesh.extent(1) << ", " << data.size
              << " bytes of text" << std::endl;

  std::optional<dcp::Pending> pending;                                   // the save that is under way
  auto const finish_save = [&] {
    if (!pending) return;
    dcp::Report const report = pending->wait();                          // throws, on all ranks, what any rank threw
    pending.reset();
    double behind = 0;
    for (auto const& phase : report.phases)
      if (phase.name == "write" || phase.name == "sync") behind += phase.longest();
    if (speaks) std::printf("saved %s: training stood still for %.4f s, writing took %.3f s behind it\n", report.place.c_str(), report.stall_seconds, behind);
  };

  auto const begin = std::chrono::steady_clock::now();
  std::int64_t const first = step;
  bool stop = false;
  while (step < options.steps && !stop) {
    auto const done = trainer.step();
    stop = done.stop;
    ++step;
    auto const number = static_cast<long long>(step);
    if (speaks) std::printf("step %lld loss %a %.4f\n", number, done.loss, done.loss), std::fflush(stdout);
    bool const due = stop || step == options.steps || (options.save_every > 0 && step % options.save_every == 0);
    if (due && checkpoints && (!stop || checkpoints->flush(10s))) {      // no time for one more while a storage does not answer
      finish_save();
      pending.emplace(checkpoints->async_save(step, state));             // returns when the state has been copied: training may change it
    }
  }
  // Who sends SIGTERM sends SIGKILL soon, job schedulers mostly after half a minute.
  if (stop && checkpoints && !checkpoints->flush(10s)) {
    if (speaks) std::cout << "SIGTERM: step " << step << " could not be saved in time; the checkpoint before it is there" << std::endl;
    dcp::set_exit_deadline(0s);                                          // the end of the process need not wait for it either
    return false;
  }
  finish_save();
  if (stop && speaks) std::cout << "SIGTERM: all ranks end after step " << step << (checkpoints ? ", which is saved" : "") << std::endl;
  double const seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (speaks && step > first) std::printf("%.3f s per step\n", seconds / static_cast<double>(step - first));
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGTERM, [](int) { told_to_stop = 1; });
  MPI_Init(&argc, &argv);
  int status = 0;
  try {
    dcp::MpiComm world{MPI_COMM_WORLD};
    try {
      if (!train(parse(argc, argv, world.size()), world)) status = 1;
    } catch (dcp::Error const& error) {                                  // every rank has it: all end in order
      if (world.rank() == 0) std::cerr << error.what() << '\n';
      status = 1;
    }
  } catch (std::exception const& error) {                                // perhaps only this one has it, and others would wait
    std::cerr << error.what() << '\n';
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
  return status;
}

// eval and infer.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "commands.h"
#include "error.h"
#include "prefix_cache.h"

namespace pockc::cli {
namespace {

int find_logits(const Program& program, const EntryRecord& entry, int64_t batch) {
  for (size_t i = 0; i < entry.outputs.size(); ++i) {
    const Tensor& type = program.tensors[entry.outputs[i].tensor].type;
    if (type.dtype == DType::kF32 && type.rank == 2 && type.dims[0] == batch) return static_cast<int>(i);
  }
  return -1;
}

// Where the entry has an output of this name that counts something per sample, else -1.
int find_counts(const Program& program, const EntryRecord& entry, const char* name, int64_t batch) {
  for (size_t i = 0; i < entry.outputs.size(); ++i) {
    const Tensor& type = program.tensors[entry.outputs[i].tensor].type;
    const bool fits = type.dtype == DType::kI64 && type.rank == 1 && type.dims[0] == batch;
    if (fits && entry.outputs[i].name == name) return static_cast<int>(i);
  }
  return -1;
}

bool has_labels(const Program& program, const EntryRecord& entry, int64_t batch) {
  for (const Argument& input : entry.inputs) {
    const Tensor& type = program.tensors[input.tensor].type;
    if (input.name == "labels") return type.dtype == DType::kI64 && type.rank == 1 && type.dims[0] == batch;
  }
  return false;
}

// Samples [first, first + batch), going on from the start past the end. Returns how many are real.
int64_t fill_batch(int64_t first, int64_t samples, std::vector<int64_t>* indices) {
  const int64_t batch = static_cast<int64_t>(indices->size());
  for (int64_t i = 0; i < batch; ++i) (*indices)[i] = (first + i) % samples;
  return samples - first < batch ? samples - first : batch;
}

Status run_batch(Model* model, const EntryRecord& entry, const Dataset& data,
                 const std::vector<Output>& outputs) {
  std::vector<const char*> names;
  std::vector<pk_tensor> tensors;
  for (const Output& output : outputs) {
    names.push_back(output.name);
    tensors.push_back(output.tensor);
  }
  return model->session.run(entry.name.c_str(), data.names(), data.tensors(), data.count(), names.data(),
                            tensors.data(), static_cast<int32_t>(tensors.size()));
}

Status load_weights(Model* model, const Options& options) {
  return options.checkpoint.empty() ? PK_OK : model->session.load(options.checkpoint.c_str());
}

}  // namespace

Status Evaluator::open(const std::string& path, const Model& model, PrefixCaches* caches, const char* name) {
  entry_ = model.entry("eval_step");
  if (entry_ == nullptr) return PK_NOT_FOUND;
  if (caches == nullptr) {
    POCKC_TRY(data_.open(path, model.program, *entry_));
  } else {
    POCKC_TRY(caches->bind(name, path, model, &entry_, &data_));
  }
  find_outputs(model);
  return PK_OK;
}

Status Evaluator::open_part(const Dataset& data, std::vector<int64_t> samples, const Model& model) {
  entry_ = model.entry("eval_step");
  if (entry_ == nullptr) return PK_NOT_FOUND;
  const EntryRecord* behind = data.cache() == nullptr ? nullptr : encoded_entry(model.program, *entry_);
  if (behind != nullptr) entry_ = behind;
  POCKC_TRY(data_.share(data, model.program, *entry_));
  part_ = std::move(samples);
  find_outputs(model);
  return PK_OK;
}

void Evaluator::find_outputs(const Model& model) {
  for (const Argument& argument : entry_->outputs) outputs_.emplace_back(model.program, argument);
  loss_output_ = find_loss(model.program, *entry_);
  correct_output_ = find_counts(model.program, *entry_, "correct", data_.batch_size());
  counted_output_ = find_counts(model.program, *entry_, "counted", data_.batch_size());
  if (has_labels(model.program, *entry_, data_.batch_size())) {
    logits_output_ = find_logits(model.program, *entry_, data_.batch_size());
  }
}

Status Evaluator::run(Model* model, bool show_progress) {
  std::vector<int64_t> indices(static_cast<size_t>(data_.batch_size()));
  const int64_t batches = (samples() - 1) / data_.batch_size() + 1;
  Progress progress("evaluating", batches, show_progress);
  double loss_sum = 0;
  int64_t loss_batches = 0;
  correct_ = counted_ = 0;
  for (int64_t i = 0; i < batches && stop_signal() == 0; ++i) {
    const int64_t real = fill_batch(i * data_.batch_size(), samples(), &indices);
    for (size_t k = 0; k < indices.size() && !part_.empty(); ++k)
      indices[k] = part_[static_cast<size_t>(indices[k])];
    POCKC_TRY(data_.gather(indices.data(), &model->session));
    POCKC_TRY(run_batch(model, *entry_, data_, outputs_));
    const bool full = real == data_.batch_size() || batches == 1;
    if (full && loss_output_ >= 0) {
      loss_sum += static_cast<double>(outputs_[loss_output_].floats()[0]);
      ++loss_batches;
    }
    if (correct_output_ >= 0 && counted_output_ >= 0) {
      add_counts(real);
    } else if (logits_output_ >= 0) {
      count_correct(real);
    }
    progress.show(i + 1, "");
  }
  loss_ = loss_batches == 0 ? NAN : loss_sum / static_cast<double>(loss_batches);
  accuracy_ = counted_ == 0 ? NAN : static_cast<double>(correct_) / static_cast<double>(counted_);
  return PK_OK;
}

void Evaluator::add_counts(int64_t real) {
  for (int64_t i = 0; i < real; ++i) {
    correct_ += outputs_[correct_output_].integers()[i];
    counted_ += outputs_[counted_output_].integers()[i];
  }
}

void Evaluator::count_correct(int64_t real) {
  const Output& logits = outputs_[logits_output_];
  const int64_t classes = logits.tensor.dims[1];
  const int64_t* labels = data_.integers("labels");
  for (int64_t i = 0; i < real; ++i) {
    if (labels[i] < 0) continue;
    const float* row = logits.floats() + i * classes;
    int64_t best = 0;
    for (int64_t c = 1; c < classes; ++c) best = row[c] > row[best] ? c : best;
    correct_ += best == labels[i] ? 1 : 0;
    ++counted_;
  }
}

std::string Evaluator::describe() const {
  std::string text;
  if (!std::isnan(loss_)) text += format("loss %.4f", loss_);
  if (!std::isnan(accuracy_)) text += format("%saccuracy %.4f", text.empty() ? "" : "  ", accuracy_);
  return text;
}

int evaluate(const Options& options) {
  Model model;
  Evaluator evaluator;
  if (check_writable(options.json) != PK_OK || model.open(options) != PK_OK ||
      load_weights(&model, options) != PK_OK || evaluator.open(options.data, model) != PK_OK) {
    return report_failure();
  }
  const double start = wall_seconds();
  if (evaluator.run(&model, !options.quiet) != PK_OK) return report_failure();
  std::printf("%s  samples %lld\n", evaluator.describe().c_str(),
              static_cast<long long>(evaluator.samples()));
  if (options.json.empty()) return 0;
  JsonObject report;
  report.add("loss", evaluator.loss())
      .add("accuracy", evaluator.accuracy())
      .add("samples", evaluator.samples());
  report.add("seconds", wall_seconds() - start);
  model.describe(&report);
  return write_report(options.json, report.text() + "\n") == PK_OK ? 0 : report_failure();
}

namespace {

// An output of every sample, collected batch by batch.
struct Collected {
  NumpyArray array;
  std::vector<uint8_t> bytes;
  size_t sample_bytes;
};

NumpyType numpy_type(pk_dtype dtype) {
  static const NumpyType kTypes[] = {NumpyType::kF32, NumpyType::kI64, NumpyType::kI32, NumpyType::kU8,
                                     NumpyType::kBool};
  return kTypes[dtype];
}

Status make_collected(const Output& output, const Dataset& data, Collected* out) {
  const pk_tensor& tensor = output.tensor;
  if (tensor.rank == 0 || tensor.dims[0] != data.batch_size()) {
    return fail(PK_UNSUPPORTED, "output `%s` of `infer` is not per sample: its first axis is not the batch",
                output.name);
  }
  out->array.name = output.name;
  out->array.type = numpy_type(tensor.dtype);
  out->array.shape.assign(tensor.dims, tensor.dims + tensor.rank);
  out->array.shape[0] = data.samples();
  out->sample_bytes = numpy_type_size(out->array.type);
  for (int axis = 1; axis < tensor.rank; ++axis) out->sample_bytes *= static_cast<size_t>(tensor.dims[axis]);
  out->bytes.resize(out->sample_bytes * static_cast<size_t>(data.samples()));
  out->array.data = out->bytes.data();
  out->array.bytes = out->bytes.size();
  return PK_OK;
}

Status infer_all(Model* model, const Options& options, int64_t* samples) {
  const EntryRecord* entry = model->entry("infer");
  if (entry == nullptr) return PK_NOT_FOUND;
  Dataset data;
  POCKC_TRY(data.open(options.data, model->program, *entry));
  std::vector<Output> outputs;
  std::vector<Collected> collected(entry->outputs.size());
  for (const Argument& argument : entry->outputs) outputs.emplace_back(model->program, argument);
  for (size_t i = 0; i < outputs.size(); ++i) POCKC_TRY(make_collected(outputs[i], data, &collected[i]));

  *samples = data.samples();
  std::vector<int64_t> indices(static_cast<size_t>(data.batch_size()));
  Progress progress("inferring", data.samples(), !options.quiet);
  for (int64_t first = 0; first < data.samples(); first += data.batch_size()) {
    const int64_t real = fill_batch(first, data.samples(), &indices);
    POCKC_TRY(data.gather(indices.data(), &model->session));
    POCKC_TRY(run_batch(model, *entry, data, outputs));
    for (size_t i = 0; i < outputs.size(); ++i) {
      const size_t size = collected[i].sample_bytes;
      std::memcpy(collected[i].bytes.data() + size * static_cast<size_t>(first), outputs[i].tensor.data,
                  size * static_cast<size_t>(real));
    }
    progress.show(first + real, "");
  }
  std::vector<NumpyArray> arrays;
  for (const Collected& item : collected) arrays.push_back(item.array);
  return write_npz(options.output, arrays);
}

}  // namespace

int infer(const Options& options) {
  Model model;
  int64_t samples = 0;
  if (check_writable(options.output) != PK_OK || model.open(options) != PK_OK ||
      load_weights(&model, options) != PK_OK || infer_all(&model, options, &samples) != PK_OK) {
    return report_failure();
  }
  if (!options.quiet)
    std::printf("%s: %lld samples\n", options.output.c_str(), static_cast<long long>(samples));
  return 0;
}

}  // namespace pockc::cli

// The C ABI: checks pointers, forwards to Program and Session.
#include <cstring>
#include <new>

#include "error.h"
#include "session.h"

using pockc::fail;

struct pk_program {
  pockc::Program program;
};

struct pk_session {
  pockc::Session session;
};

namespace {

pk_status null_argument(const char* function) {
  return fail(PK_INVALID_ARGUMENT, "%s: an argument is null", function);
}

bool all_named(const char* const* names, const pk_tensor* tensors, int32_t count) {
  if (count < 0) return false;
  if (count > 0 && (names == nullptr || tensors == nullptr)) return false;
  for (int32_t i = 0; i < count; ++i) {
    if (names[i] == nullptr) return false;
  }
  return true;
}

pk_tensor describe(const pockc::Tensor& type) {
  pk_tensor tensor{};
  tensor.dtype = static_cast<pk_dtype>(type.dtype);
  tensor.rank = type.rank;
  std::memcpy(tensor.dims, type.dims, sizeof(tensor.dims));
  return tensor;
}

}  // namespace

const char* pk_version(void) { return POCKC_VERSION; }

const char* pk_status_string(pk_status status) {
  static const char* const kNames[] = {
      "ok",          "invalid argument", "not found",     "type mismatch",      "bad file",
      "wrong model", "unsupported",      "out of memory", "input/output error", "internal error"};
  const int code = static_cast<int>(status);
  return code >= 0 && code <= PK_INTERNAL ? kNames[code] : "unknown status";
}

const char* pk_last_error(void) { return pockc::last_error(); }

pk_status pk_program_load(const char* path, pk_program** out_program) {
  if (path == nullptr || out_program == nullptr) return null_argument("pk_program_load");
  *out_program = nullptr;
  pk_program* program = new (std::nothrow) pk_program;
  if (program == nullptr) return fail(PK_OUT_OF_MEMORY, "no memory for the program");
  const pk_status status = pockc::load_program(path, &program->program);
  if (status != PK_OK) {
    delete program;
    return status;
  }
  *out_program = program;
  return PK_OK;
}

void pk_program_free(pk_program* program) { delete program; }

const char* pk_program_metadata(const pk_program* program) {
  return program == nullptr ? "" : program->program.metadata_text();
}

pk_status pk_program_tensor(const pk_program* program, const char* entry, pk_role role, int32_t index,
                            const char** out_name, pk_tensor* out_tensor) {
  if (program == nullptr || out_name == nullptr || out_tensor == nullptr)
    return null_argument("pk_program_tensor");
  const pockc::Program& tables = program->program;
  const size_t position = static_cast<size_t>(index);
  if (role == PK_STATE) {
    if (index < 0 || position >= tables.states.size())
      return fail(PK_NOT_FOUND, "there is no state %d", index);
    const pockc::StateRecord& state = tables.states[position];
    *out_name = state.name.c_str();
    *out_tensor = describe(state.original_type(tables.tensors[state.tensor].type));
    return PK_OK;
  }
  if (role != PK_INPUT && role != PK_OUTPUT)
    return fail(PK_INVALID_ARGUMENT, "unknown role %d", static_cast<int>(role));
  if (entry == nullptr) return null_argument("pk_program_tensor");
  const pockc::EntryRecord* record = tables.find_entry(entry);
  if (record == nullptr) return fail(PK_NOT_FOUND, "the program has no entry `%s`", entry);
  const std::vector<pockc::Argument>& arguments = role == PK_INPUT ? record->inputs : record->outputs;
  if (index < 0 || position >= arguments.size())
    return fail(PK_NOT_FOUND, "entry `%s` has no argument %d", entry, index);
  *out_name = arguments[position].name.c_str();
  *out_tensor = describe(tables.tensors[arguments[position].tensor].type);
  return PK_OK;
}

pk_status pk_session_create(const pk_program* program, const pk_session_options* options,
                            pk_session** out_session) {
  if (program == nullptr || out_session == nullptr) return null_argument("pk_session_create");
  *out_session = nullptr;
  pk_session* session = new (std::nothrow) pk_session;
  if (session == nullptr) return fail(PK_OUT_OF_MEMORY, "no memory for the session");
  pockc::SessionSettings settings;
  if (options != nullptr) {
    settings.threads = options->threads;
    settings.reference_only = options->use_ref_only != 0;
  }
  const pk_status status = session->session.create(program->program, settings);
  if (status != PK_OK) {
    delete session;
    return status;
  }
  *out_session = session;
  return PK_OK;
}

void pk_session_free(pk_session* session) { delete session; }

pk_status pk_session_input(pk_session* session, const char* entry, const char* name, pk_tensor* out_tensor) {
  if (session == nullptr || entry == nullptr || name == nullptr || out_tensor == nullptr)
    return null_argument("pk_session_input");
  return session->session.input(entry, name, out_tensor);
}

pk_status pk_session_run(pk_session* session, const char* entry, const char* const* input_names,
                         const pk_tensor* inputs, int32_t input_count, const char* const* output_names,
                         const pk_tensor* outputs, int32_t output_count) {
  if (session == nullptr || entry == nullptr || !all_named(input_names, inputs, input_count) ||
      !all_named(output_names, outputs, output_count)) {
    return null_argument("pk_session_run");
  }
  return session->session.run(entry, input_names, inputs, input_count, output_names, outputs, output_count);
}

pk_status pk_session_read_state(pk_session* session, const char* name, pk_tensor* out_tensor) {
  if (session == nullptr || name == nullptr || out_tensor == nullptr)
    return null_argument("pk_session_read_state");
  return session->session.read_state(name, out_tensor);
}

pk_status pk_session_write_state(pk_session* session, const char* name, const pk_tensor* tensor) {
  if (session == nullptr || name == nullptr || tensor == nullptr)
    return null_argument("pk_session_write_state");
  return session->session.write_state(name, *tensor);
}

pk_status pk_session_save(pk_session* session, const char* path, const char* cursor_json) {
  if (session == nullptr || path == nullptr) return null_argument("pk_session_save");
  return session->session.save(path, cursor_json);
}

pk_status pk_session_load(pk_session* session, const char* path, const char** out_cursor_json) {
  if (session == nullptr || path == nullptr) return null_argument("pk_session_load");
  const pk_status status = session->session.load(path);
  if (status == PK_OK && out_cursor_json != nullptr) *out_cursor_json = session->session.cursor().c_str();
  return status;
}

pk_status pk_session_memory(const pk_session* session, pk_memory* out_memory) {
  if (session == nullptr || out_memory == nullptr) return null_argument("pk_session_memory");
  *out_memory = session->session.memory();
  return PK_OK;
}

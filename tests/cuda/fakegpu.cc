// A GPU that computes nothing: libcuda, cuBLAS, cuBLASLt, cuRAND and cuDNN in one library, which record what a program asks of them.
//
// Reading device memory back gives what was uploaded, or zeros: kernels don't run. What comes out are counts of calls, copies and
// bytes, shapes of matrix products and convolutions, the peak of the memory, and faults: a buffer used on one queue while work on
// another that nothing waits for may still use it, memory used after it was freed, a copy, product or convolution past the end of
// its buffer, a launch that a real card refuses, a kernel that no module has.
//
//   FAKEGPU_OUT       the counts are written to $FAKEGPU_OUT.json at the end, and (with this library in LD_PRELOAD) to
//                     $FAKEGPU_OUT.N.json after the Nth line of metrics.jsonl: two neighbours are a training step apart
//   FAKEGPU_MEMORY    the card's memory in GiB, 80 if not set. An allocation beyond it fails as on a card.
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

namespace {

using u64 = uint64_t;

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

std::string format(const char *pattern, ...) {
  char text[512];
  va_list args;
  va_start(args, pattern);
  vsnprintf(text, sizeof text, pattern, args);
  va_end(args);
  return text;
}

// ---- what is counted ----------------------------------------------------------------------------------------------------------

struct Count {
  u64 calls = 0;
  double work = 0; // bytes of a copy or kernel, FLOP of a product or convolution
};

std::map<std::string, u64> calls;                             // by function
std::map<std::string, Count> copies, kernels, gemms, convolutions; // by direction; by name, sizes and arguments; by type and shape
std::map<std::string, u64> faults, unsynchronised;            // by what and where
u64 launches, waits, small_uploads, live, peak, allocated, modules;
std::set<long> submitting; // threads

void fault(const std::string &what) {
  if (!faults[what]++) fprintf(stderr, "[fakegpu] %s\n", what.c_str());
}

long thread_id() {
  static thread_local long id = syscall(SYS_gettid);
  return id;
}

void add(std::map<std::string, Count> &to, const std::string &key, double work) {
  auto &count = to[key];
  count.calls++;
  count.work += work;
}

void write_counts(const std::string &path) {
  FILE *file = fopen(path.c_str(), "w");
  if (!file) return;
  auto numbers = [&](const char *name, const std::map<std::string, u64> &map) {
    fprintf(file, "\"%s\": {", name);
    const char *comma = "";
    for (auto &[key, n] : map) fprintf(file, "%s\n  \"%s\": %lu", comma, key.c_str(), n), comma = ",";
    fprintf(file, "},\n");
  };
  auto counts = [&](const char *name, const std::map<std::string, Count> &map) {
    fprintf(file, "\"%s\": {", name);
    const char *comma = "";
    for (auto &[key, c] : map) fprintf(file, "%s\n  \"%s\": [%lu, %.0f]", comma, key.c_str(), c.calls, c.work), comma = ",";
    fprintf(file, "},\n");
  };
  fprintf(file, "{\n");
  numbers("calls", calls);
  numbers("faults", faults);
  numbers("unsynchronised", unsynchronised);
  counts("copies", copies);
  counts("kernels", kernels);
  counts("gemms", gemms);
  counts("convolutions", convolutions);
  fprintf(file,
          "\"launches\": %lu, \"waits\": %lu, \"small_uploads\": %lu, \"live\": %lu, \"peak\": %lu, \"allocated\": %lu, "
          "\"modules\": %lu, \"threads\": %zu\n}\n",
          launches, waits, small_uploads, live, peak, allocated, modules, submitting.size());
  fclose(file);
}

struct AtExit {
  ~AtExit() {
    Lock lock(mutex);
    if (const char *out = getenv("FAKEGPU_OUT")) {
      if (launches || allocated) write_counts(std::string(out) + ".json"); // not for a shell started with the same variables
    }
  }
} at_exit;

// ---- order: a vector clock for each queue ---------------------------------------------------------------------------------------

// A queue is a stream; with the per-thread default stream each thread has one.
using Clock = std::vector<u64>;
struct Queue {
  bool blocking = true; // waits for the legacy default stream, which waits for it
  Clock seen;           // for each queue: the number of its operations that ended before this queue's next one starts
};
std::vector<Queue> queues;
Clock host; // what some thread has waited for
std::unordered_map<u64, bool> streams; // created ones: blocking?
std::map<std::pair<u64, long>, int> numbers;
std::unordered_map<u64, Clock> events;

void join(Clock &into, const Clock &from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}
u64 at(const Clock &clock, size_t i) { return i < clock.size() ? clock[i] : 0; }

int queue_of(const void *stream) {
  u64 handle = (u64)stream;
  if (handle == 1) handle = 0; // the legacy default stream by its name
  auto key = std::make_pair(handle, handle == 2 ? thread_id() : 0L);
  auto [entry, fresh] = numbers.try_emplace(key, (int)queues.size());
  if (fresh) {
    Queue queue;
    if (auto known = streams.find(handle); known != streams.end()) queue.blocking = known->second;
    queues.push_back(queue);
    if (handle == 0) queues.back().blocking = false;
  }
  return entry->second;
}

// A new operation on a queue; returns its number there.
u64 submit(int q) {
  submitting.insert(thread_id());
  int legacy = queue_of(nullptr);
  auto &seen = queues[q].seen;
  join(seen, host);
  if (q == legacy) {
    for (auto &other : queues)
      if (other.blocking) join(seen, other.seen);
  } else if (queues[q].blocking) {
    join(seen, queues[legacy].seen);
  }
  if (seen.size() <= (size_t)q) seen.resize(q + 1);
  return ++seen[q];
}

// The host waits until `until` has passed. It is counted if there was something to wait for.
void wait_for(const Clock &until) {
  for (size_t i = 0; i < until.size(); i++)
    if (until[i] > at(host, i)) {
      waits++;
      break;
    }
  join(host, until);
}

// ---- memory ---------------------------------------------------------------------------------------------------------------------

struct Use {
  int queue;
  u64 time;
  bool writes;
};
struct Buffer {
  u64 size;
  char *memory = nullptr; // of small ones
  std::vector<Use> uses;  // since they may not have ended
  std::vector<u64> table; // pointers to device memory among the content that was uploaded
};
const u64 FIRST = 0x100000000000;
const u64 WITH_MEMORY = 4 << 20, TABLE = 1 << 20;
u64 next_address = FIRST;
std::map<u64, Buffer> buffers;
std::map<u64, u64> pinned;

u64 card_memory() {
  static u64 bytes = [] {
    const char *gib = getenv("FAKEGPU_MEMORY");
    return (u64)((gib ? atof(gib) : 80) * (1 << 30));
  }();
  return bytes;
}

Buffer *find(u64 address, u64 *start = nullptr) {
  auto it = buffers.upper_bound(address);
  if (it == buffers.begin()) return nullptr;
  --it;
  if (address >= it->first + it->second.size) return nullptr;
  if (start) *start = it->first;
  return &it->second;
}

void used(Buffer &buffer, int q, u64 time, bool writes, const std::string &what) {
  auto &seen = queues[q].seen;
  bool conflict = false;
  std::vector<Use> left; // what later uses have to be ordered after, besides this one
  for (auto &use : buffer.uses) {
    bool ordered = use.queue == q || at(seen, use.queue) >= use.time;
    if (!ordered && (use.writes || writes)) conflict = true;
    else if (!writes && (use.writes || !ordered)) left.push_back(use);
  }
  if (conflict) unsynchronised[what]++;
  left.push_back({q, time, writes});
  buffer.uses = std::move(left);
}

// An operation uses `bytes` from `address` on.
Buffer *use(u64 address, u64 bytes, int q, u64 time, bool writes, const std::string &what) {
  u64 start = 0;
  Buffer *buffer = find(address, &start);
  if (!buffer) {
    if (bytes) fault("memory that is not allocated: " + what);
    return nullptr;
  }
  if (address - start + bytes > buffer->size) fault("past the end of a buffer: " + what);
  used(*buffer, q, time, writes, what);
  return buffer;
}

int allocate(u64 *address, u64 size, int q) {
  *address = 0;
  if (!size) return 1;
  if (live + size > card_memory()) {
    fault("out of memory");
    return 2;
  }
  Buffer buffer;
  buffer.size = size;
  if (size <= WITH_MEMORY) buffer.memory = (char *)calloc(1, size);
  if (q >= 0) buffer.uses.push_back({q, submit(q), true});
  *address = next_address;
  next_address += (size + 1023) / 512 * 512;
  live += size;
  allocated += size;
  peak = std::max(peak, live);
  buffers.emplace(*address, std::move(buffer));
  return 0;
}

int release(u64 address, int q) {
  if (!address) return 0;
  auto it = buffers.find(address);
  if (it == buffers.end()) {
    fault("a free of memory that is not allocated");
    return 1;
  }
  if (q >= 0) used(it->second, q, submit(q), true, "free");
  live -= it->second.size;
  free(it->second.memory);
  buffers.erase(it);
  return 0;
}

char *content(u64 address, u64 bytes) {
  u64 start = 0;
  Buffer *buffer = find(address, &start);
  return buffer && buffer->memory && address - start + bytes <= buffer->size ? buffer->memory + (address - start) : nullptr;
}

bool is_pinned(const void *p) {
  auto it = pinned.upper_bound((u64)p);
  return it != pinned.begin() && (u64)p < (--it)->first + it->second;
}

int upload(u64 to, const void *from, u64 bytes, int q) {
  add(copies, "h2d", bytes);
  if (bytes <= 256) small_uploads++;
  Buffer *buffer = use(to, bytes, q, submit(q), true, "h2d");
  if (char *memory = content(to, bytes)) memcpy(memory, from, bytes);
  if (buffer && bytes % 8 == 0 && bytes <= TABLE) {
    buffer->table.clear();
    for (u64 i = 0; i < bytes / 8; i++) {
      u64 word;
      memcpy(&word, (const char *)from + 8 * i, 8);
      if (word >= FIRST && find(word)) buffer->table.push_back(word);
    }
  }
  return 0;
}

int download(void *to, u64 from, u64 bytes, int q) {
  add(copies, "d2h", bytes);
  use(from, bytes, q, submit(q), false, "d2h");
  if (char *memory = content(from, bytes)) memcpy(to, memory, bytes);
  else memset(to, 0, bytes);
  if (!is_pinned(to)) wait_for(queues[q].seen); // the driver does, for pageable memory
  return 0;
}

int copy(u64 to, u64 from, u64 bytes, int q) {
  add(copies, "d2d", bytes);
  u64 time = submit(q);
  use(from, bytes, q, time, false, "d2d");
  use(to, bytes, q, time, true, "d2d");
  char *a = content(to, bytes), *b = content(from, bytes);
  if (a && b) memmove(a, b, bytes);
  return 0;
}

int fill(u64 to, u64 pattern, u64 width, u64 n, int q) {
  add(copies, "memset", n * width);
  use(to, n * width, q, submit(q), true, "memset");
  if (char *memory = content(to, n * width))
    for (u64 i = 0; i < n; i++) memcpy(memory + i * width, &pattern, width);
  return 0;
}

// ---- kernels, known by their PTX ------------------------------------------------------------------------------------------------

struct Kernel {
  std::string name, body;
  std::vector<u64> sizes;    // of the parameters
  std::vector<bool> written; // which parameters are addresses that the kernel writes to; filled at the first launch
  u64 most_threads = 1024, shared_limit = 49152, fixed_shared = 0;
  bool analysed = false;
};
struct Module {
  std::map<std::string, Kernel *> kernels;
};

bool word_character(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }

// Words of a PTX instruction.
std::vector<std::string> words(const std::string &line) {
  std::vector<std::string> found;
  for (size_t i = 0; i < line.size();) {
    size_t start = i;
    while (i < line.size() && word_character(line[i])) i++;
    if (i > start) found.push_back(line.substr(start, i - start));
    else i++;
  }
  return found;
}

struct Instruction {
  std::string op;
  std::vector<std::string> to, from; // the first operand, which may be a vector, and the others
};

std::vector<Instruction> instructions(const std::string &body) {
  std::string text;
  for (size_t i = 0; i < body.size(); i++) {
    if (body.compare(i, 2, "//") == 0) i = std::min(body.find('\n', i), body.size() - 1);
    text += body[i];
  }
  std::vector<Instruction> found;
  for (size_t i = 0, end; i < text.size(); i = end + 1) {
    end = std::min(text.find(';', i), text.size());
    std::string line = text.substr(i, end - i);
    // Before the instruction: the braces of a block, labels, a predicate.
    for (bool more = true; more;) {
      more = false;
      line.erase(0, std::min(line.find_first_not_of(" \t\n{}"), line.size()));
      size_t word = 0;
      while (word < line.size() && (word_character(line[word]) || (word == 0 && line[0] == '@') || line[word] == '!')) word++;
      if (word && (line[0] == '@' || (word < line.size() && line[word] == ':'))) {
        line.erase(0, word + (line[0] != '@'));
        more = true;
      }
    }
    size_t op = 0;
    while (op < line.size() && word_character(line[op])) op++;
    if (!op || line[0] == '.') continue;
    size_t first = line.find_first_not_of(" \t\n", op);
    size_t comma = first == std::string::npos ? first : line[first] == '{' ? line.find('}', first) : line.find(',', first);
    comma = std::min(comma, line.size());
    found.push_back({line.substr(0, op), words(line.substr(op, comma - op)), words(line.substr(comma))});
  }
  return found;
}

// Follows each parameter through the registers to the addresses of stores and atomics. If there are none, all count as written.
void analyse(Kernel &k) {
  using Set = std::vector<bool>;
  k.analysed = true;
  k.written.assign(k.sizes.size(), false);
  auto code = instructions(k.body);
  k.body.clear();
  auto starts = [](const std::string &text, const char *with) { return text.rfind(with, 0) == 0; };
  std::unordered_map<std::string, Set> sources; // the parameters that a register's value comes from
  std::string prefix = k.name + "_param_";
  auto sources_of = [&](const std::vector<std::string> &names, Set &set) {
    bool any = false;
    for (auto &name : names) {
      size_t parameter = starts(name, prefix.c_str()) ? strtoul(name.c_str() + prefix.size(), nullptr, 10) : set.size();
      if (parameter < set.size()) set[parameter] = any = true;
      if (auto it = sources.find(name); it != sources.end())
        for (size_t p = 0; p < set.size(); p++)
          if (it->second[p]) set[p] = any = true;
    }
    return any;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (auto &i : code) {
      if (starts(i.op, "st") || starts(i.op, "ld.global") || starts(i.op, "ld.shared") || starts(i.op, "ld.local")) continue;
      Set set(k.sizes.size());
      if (!sources_of(i.from, set)) continue;
      for (auto &to : i.to) {
        auto &have = sources[to];
        have.resize(set.size());
        for (size_t p = 0; p < set.size(); p++)
          if (set[p] && !have[p]) have[p] = changed = true;
      }
    }
  }
  bool any = false;
  for (auto &i : code) {
    bool near = i.op.find(".shared") != std::string::npos || i.op.find(".local") != std::string::npos;
    // What is handed to a called function counts as written, too.
    if (starts(i.op, "st.param")) any |= sources_of(i.from, k.written);
    else if (starts(i.op, "cp.async.bulk.global") || starts(i.op, "cp.reduce") || ((starts(i.op, "st.") || starts(i.op, "red.")) && !near)) any |= sources_of(i.to, k.written);
    else if (starts(i.op, "atom") && !near && !i.from.empty()) any |= sources_of({i.from[0]}, k.written);
  }
  if (!any) k.written.assign(k.sizes.size(), true);
}

int load(Module **out, const char *text) {
  modules++;
  auto *module = new Module;
  *out = module;
  if (!memcmp(text, "\x7f" "ELF", 4) || *(const uint32_t *)text == 0xBA55ED50) {
    fault("a module that is not PTX");
    return 200;
  }
  const char *p = text;
  while ((p = strstr(p, ".entry "))) {
    p += 7;
    const char *open = strchr(p, '('), *close = open ? strchr(open, ')') : nullptr, *body = close ? strchr(close, '{') : nullptr;
    if (!body) break;
    auto *k = new Kernel;
    for (const char *c = p; c < open && word_character(*c); c++) k->name += *c;
    // `.param .u64 name`, `.param .u64 .ptr .global .align 1 name` or `.param .align 8 .b8 name[64]`
    std::string head(open + 1, close);
    for (size_t i = 0; (i = head.find(".param", i)) != std::string::npos;) {
      size_t end = head.find(',', i);
      std::string one = head.substr(i + 6, (end == std::string::npos ? head.size() : end) - i - 6);
      u64 size = 8;
      for (auto &word : words(one))
        if (word.size() > 2 && word[0] == '.' && strchr("usbf", word[1]) && isdigit(word[2])) size = atoi(word.c_str() + 2) / 8;
      if (size_t bracket = one.find('['); bracket != std::string::npos) size *= atoi(one.c_str() + bracket + 1);
      k->sizes.push_back(size);
      i += 6;
    }
    std::string between(close, body);
    for (const char *limit : {".maxntid", ".reqntid"})
      if (size_t i = between.find(limit); i != std::string::npos) {
        k->most_threads = 1;
        for (auto &word : words(between.substr(i + 8, between.find('.', i + 1) - i - 8)))
          if (isdigit(word[0])) k->most_threads *= atoi(word.c_str());
      }
    const char *end = body;
    for (int depth = 0; *end; end++) {
      if (*end == '{') depth++;
      if (*end == '}' && !--depth) break;
    }
    k->body.assign(body + 1, end);
    // `.shared .align 4 .b8 name[1024]` in the body
    for (size_t i = 0; (i = k->body.find(".shared .align", i)) != std::string::npos; i += 7)
      if (size_t bracket = k->body.find('[', i); bracket < k->body.find(';', i)) k->fixed_shared += atoi(k->body.c_str() + bracket + 1);
    module->kernels[k->name] = k;
    p = end;
  }
  return 0;
}

// Bytes of an element, by candle's names: the widest of the types that end with the name. 0 for a kernel that is not candle's.
u64 element_size(const std::string &name) {
  u64 widest = 0;
  for (auto [type, size] : {std::pair<const char *, u64>{"u8", 1}, {"f16", 2}, {"i16", 2}, {"f32", 4}, {"u32", 4}, {"i32", 4}, {"f64", 8}, {"i64", 8}})
    if (name.find(std::string("_") + type) != std::string::npos || name.find(std::string("_b") + type) != std::string::npos)
      widest = std::max(widest, size);
  return widest;
}

int launch(Kernel *k, const unsigned grid[3], const unsigned block[3], unsigned shared, const void *stream, void **params) {
  launches++;
  std::string where = "kernel " + k->name;
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535) return fault("refused grid: " + where), 1;
  u64 threads = (u64)block[0] * block[1] * block[2];
  if (!threads || threads > k->most_threads || block[2] > 64) return fault("refused block: " + where), 1;
  if (shared + k->fixed_shared > std::max<u64>(k->shared_limit + k->fixed_shared, 49152) || shared > k->shared_limit)
    return fault("more shared memory than was asked for: " + where), 1;
  if (!params && !k->sizes.empty()) return fault("no arguments: " + where), 1;
  if (!k->analysed) analyse(*k);

  int q = queue_of(stream);
  u64 time = submit(q);
  struct Part { Buffer *buffer; u64 bytes; bool writes; };
  std::map<u64, Part> parts; // by the buffer's start
  std::string arguments;
  auto visit = [&](u64 address, bool writes) {
    u64 start = 0;
    Buffer *buffer = find(address, &start);
    if (!buffer) return false;
    auto &part = parts[start];
    part = {buffer, std::max(part.bytes, buffer->size - (address - start)), part.writes || writes};
    return true;
  };
  u64 elements = 0;
  for (size_t i = 0; i < k->sizes.size(); i++) {
    if (k->sizes[i] == 8) {
      u64 value = *(u64 *)params[i];
      if (i == 0 && value < FIRST) elements = value;
      if (visit(value, k->written[i])) {
        arguments += " p";
        Buffer *buffer = find(value);
        for (u64 pointer : buffer->table) visit(pointer, true);
        continue;
      }
      if (value >= FIRST && value < next_address) {
        // One past the end is the address of an empty part of a buffer.
        if (!find(value - 1)) fault("memory that is not allocated: " + where);
        arguments += " p";
      } else arguments += format(" %lu", value);
    } else if (k->sizes[i] == 4) arguments += format(" %d", *(int *)params[i]);
    else if (k->sizes[i] < 8) arguments += format(" %u", k->sizes[i] == 2 ? *(uint16_t *)params[i] : *(uint8_t *)params[i]);
    else {
      arguments += format(" [%lu]", k->sizes[i]);
      for (u64 at = 0; at + 8 <= k->sizes[i]; at += 8) {
        u64 word;
        memcpy(&word, (char *)params[i] + at, 8);
        if (word >= FIRST) visit(word, k->written[i]);
      }
    }
  }
  // Candle's kernels begin with the number of elements, and may be given a part of a buffer.
  if (k->name.rfind("copy2d", 0) == 0) elements = (u64)grid[0] * block[0];
  u64 most = elements ? elements * std::max<u64>(element_size(k->name), 1) : ~0ull;
  if (elements && !element_size(k->name)) most = ~0ull;
  double bytes = 0;
  for (auto &[start, part] : parts) {
    used(*part.buffer, q, time, part.writes, where);
    bytes += std::min(part.bytes, most);
  }
  add(kernels, format("%s %u,%u,%u %u,%u,%u %u", k->name.c_str(), grid[0], grid[1], grid[2], block[0], block[1], block[2], shared) + arguments, bytes);
  return 0;
}

// ---- matrix products and convolutions -------------------------------------------------------------------------------------------

const char *data_type(int t) { // cudaDataType
  return t == 0 ? "f32" : t == 1 ? "f64" : t == 2 ? "f16" : t == 14 ? "bf16" : "other";
}
u64 data_size(int t) { return t == 0 ? 4 : t == 1 ? 8 : t == 2 || t == 14 ? 2 : 1; }
const char *compute_type(int t) { // cublasComputeType_t
  return t == 64 || t == 65 ? "f16" : t == 68 || t == 69 ? "f32" : t == 74 ? "f16-fast" : t == 75 ? "bf16-fast" : t == 77 ? "tf32" : t == 70 ? "f64" : "other";
}

struct Blas {
  void *stream = nullptr;
  int math = 0;
};

int product(const void *stream, bool ta, bool tb, long m, long n, long k, u64 a, int at, long lda, long sa, u64 b, int bt, long ldb, long sb, u64 c,
            int ct, long ldc, long sc, long batch, const char *compute, const char *note = "") {
  if (m <= 0 || n <= 0 || k <= 0 || batch <= 0) return 0;
  launches++;
  int q = queue_of(stream);
  u64 time = submit(q);
  auto bytes = [&](long rows, long columns, long ld, long stride, int type) { return ((batch - 1) * stride + (columns - 1) * ld + rows) * data_size(type); };
  if (lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) fault("a leading dimension smaller than the matrix: gemm");
  use(a, bytes(ta ? k : m, ta ? m : k, lda, sa, at), q, time, false, "gemm");
  use(b, bytes(tb ? n : k, tb ? k : n, ldb, sb, bt), q, time, false, "gemm");
  use(c, bytes(m, n, ldc, sc, ct), q, time, true, "gemm");
  add(gemms, format("%s-%s %s m%ld n%ld k%ld batch%ld %c%c%s", data_type(at), data_type(ct), compute, m, n, k, batch, ta ? 't' : 'n', tb ? 't' : 'n', note),
      2.0 * m * n * k * batch);
  return 0;
}

const char *math_note(void *handle, const char *compute) { // f32 products with TF32 allowed by the handle
  return ((Blas *)handle)->math == 3 && !strcmp(compute, "f32") ? " math-tf32" : "";
}

struct Descriptor {
  int type = 0, math = 0, groups = 1, rank = 0;
  bool channels_last = false;
  long d[8] = {}; // a tensor's dimensions; of a convolution: padding, stride and dilation, two of each
  u64 elements() const {
    u64 n = 1;
    for (int i = 0; i < rank; i++) n *= d[i];
    return n;
  }
};
struct Dnn {
  void *stream = nullptr;
};
const char *dnn_type(int t) { return t == 0 ? "f32" : t == 1 ? "f64" : t == 2 ? "f16" : t == 9 ? "bf16" : "other"; }
u64 dnn_size(int t) { return t == 0 ? 4 : t == 1 ? 8 : t == 2 || t == 9 ? 2 : 1; }

// The three directions of a convolution: `x` and `y` are input and output of the forward one.
int convolution(const char *kind, void *handle, Descriptor *x, u64 xp, Descriptor *w, u64 wp, Descriptor *c, u64 workspace, u64 workspace_size,
                Descriptor *y, u64 yp) {
  launches++;
  int q = queue_of(((Dnn *)handle)->stream);
  u64 time = submit(q);
  std::string what = std::string("convolution ") + kind;
  use(xp, x->elements() * dnn_size(x->type), q, time, !strcmp(kind, "data"), what);
  use(wp, w->elements() * dnn_size(w->type), q, time, !strcmp(kind, "filter"), what);
  use(yp, y->elements() * dnn_size(y->type), q, time, !strcmp(kind, "forward"), what);
  if (workspace_size) use(workspace, workspace_size, q, time, true, what);
  if (x->type != w->type || x->type != y->type) fault("types of " + what + " differ");
  if (x->d[0] != y->d[0] || x->d[1] != w->d[1] * c->groups || y->d[1] != w->d[0]) fault("shapes of " + what + " don't fit");
  for (int i = 0; i < 2; i++)
    if (y->d[2 + i] != (x->d[2 + i] + 2 * c->d[i] - c->d[4 + i] * (w->d[2 + i] - 1) - 1) / c->d[2 + i] + 1) fault("shapes of " + what + " don't fit");
  const char *math[] = {"default", "tensor-op", "tensor-op-convert", "fma"};
  add(convolutions,
      format("%s %s compute-%s math-%s %s x%ldx%ldx%ldx%ld w%ldx%ldx%ldx%ld stride%ld", kind, dnn_type(x->type), dnn_type(c->type), math[c->math & 3],
             x->channels_last ? "nhwc" : "nchw", x->d[0], x->d[1], x->d[2], x->d[3], w->d[0], w->d[1], w->d[2], w->d[3], c->d[2]),
      2.0 * y->elements() * w->d[1] * w->d[2] * w->d[3]);
  return 0;
}

struct Algorithm { // cudnnConvolution*AlgoPerf_t
  int algorithm, status;
  float time;
  size_t memory;
  int determinism, math, reserved[3];
};
// cuDNN's real choices and sizes are its own. These exercise the paths of a caller: an algorithm, and a workspace that has to be there.
const u64 WORKSPACE[3] = {1 << 20, 8 << 20, 8 << 20};
int algorithms(Descriptor *c, int direction, int most, int *n, Algorithm *found) {
  *n = std::min(most, 2);
  for (int i = 0; i < *n; i++) found[i] = {1 - i, 0, (float)i, i ? 0 : WORKSPACE[direction], 1, c->math, {}};
  return 0;
}
int workspace(int direction, int algorithm, size_t *size) {
  *size = algorithm == 1 ? WORKSPACE[direction] : 0;
  return 0;
}

} // namespace

#define ENTER                                                                                                                                            \
  Lock lock(mutex);                                                                                                                                     \
  calls[__func__]++

#ifndef FOR_LINKING
// A line of metrics.jsonl is the end of a training step.
extern "C" ssize_t write(int file, const void *data, size_t bytes) {
  ssize_t written = syscall(SYS_write, file, data, bytes);
  const char *out;
  if (written > 8 && !memcmp(data, "{\"step\":", 8) && (out = getenv("FAKEGPU_OUT"))) {
    char link[64], path[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n > 13 && !memcmp(path + n - 13, "metrics.jsonl", 13)) {
      static int steps = 0;
      Lock lock(mutex);
      std::string name = format("%s.%d.json", out, ++steps);
      write_counts(name + ".new");
      rename((name + ".new").c_str(), name.c_str());
    }
  }
  return written;
}
#endif

extern "C" {

// ---- libcuda --------------------------------------------------------------------------------------------------------------------
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *v) { return *v = 13000, 0; }
int cuDeviceGet(int *d, int ordinal) { return *d = ordinal, ordinal == 0 ? 0 : 101; }
int cuDeviceGetCount(int *n) { return *n = 1, 0; }
int cuDeviceGetName(char *s, int n, int) { return snprintf(s, n, "fake GPU"), 0; }
int cuDeviceGetPCIBusId(char *s, int n, int) { return snprintf(s, n, "0000:00:00.0"), 0; }
int cuDeviceGetUuid(void *p, int) { return memset(p, 0, 16), 0; }
int cuDeviceGetUuid_v2(void *p, int) { return memset(p, 0, 16), 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = card_memory(), 0; }
int cuMemGetInfo_v2(size_t *left, size_t *all) {
  Lock lock(mutex);
  *all = card_memory();
  *left = *all - live;
  return 0;
}
int cuDeviceGetAttribute(int *v, int attribute, int) { // an H100's
  switch (attribute) {
  case 1: case 2: case 3: *v = 1024; break;                        // threads of a block
  case 4: *v = 64; break;
  case 5: *v = 2147483647; break;                                  // blocks of a grid
  case 6: case 7: *v = 65535; break;
  case 8: *v = 49152; break;                                       // shared memory of a block
  case 10: *v = 32; break;                                         // threads of a warp
  case 16: *v = 132; break;                                        // multiprocessors
  case 38: *v = 50 << 20; break;                                   // L2 cache
  case 39: *v = 2048; break;                                       // threads of a multiprocessor
  case 75: *v = 9; break;                                          // compute capability
  case 76: *v = 0; break;
  case 81: *v = 233472; break;                                     // shared memory of a multiprocessor
  case 97: *v = 232448; break;                                     // shared memory of a block that asks for it
  default: *v = 1;
  }
  return 0;
}
int cuDevicePrimaryCtxRetain(void **c, int) { return *c = (void *)0x10, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void *) { ENTER; return 0; }
int cuCtxGetCurrent(void **c) { return *c = (void *)0x10, 0; }
int cuCtxGetDevice(int *d) { return *d = 0, 0; }
int cuCtxDestroy_v2(void *) { return 0; }
int cuCtxSetFlags(unsigned) { return 0; }
int cuCtxSetLimit(int, size_t) { return 0; }
int cuCtxGetLimit(size_t *n, int) { return *n = 0, 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cuCtxSynchronize() {
  ENTER;
  Clock all;
  for (auto &queue : queues) join(all, queue.seen);
  wait_for(all);
  return 0;
}

int cuStreamCreate(void **s, unsigned flags) {
  ENTER;
  static u64 next = 0x100;
  *s = (void *)(next += 0x10);
  streams[(u64)*s] = !(flags & 1);
  return 0;
}
int cuStreamCreateWithPriority(void **s, unsigned flags, int) { return cuStreamCreate(s, flags); }
int cuStreamDestroy_v2(void *) { return 0; }
int cuStreamSynchronize(void *s) { ENTER; wait_for(queues[queue_of(s)].seen); return 0; }
int cuStreamQuery(void *) { return 0; }
int cuStreamIsCapturing(void *, int *status) { return *status = 0, 0; }
int cuStreamWaitEvent(void *s, void *e, unsigned) { ENTER; join(queues[queue_of(s)].seen, events[(u64)e]); return 0; }
int cuLaunchHostFunc(void *, void (*call)(void *), void *data) { return call(data), 0; }
int cuEventCreate(void **e, unsigned) {
  ENTER;
  static u64 next = 0x1000;
  *e = (void *)(next += 8);
  return 0;
}
int cuEventDestroy_v2(void *e) { ENTER; events.erase((u64)e); return 0; }
int cuEventRecord(void *e, void *s) {
  ENTER;
  auto &seen = queues[queue_of(s)].seen;
  events[(u64)e] = seen;
  return 0;
}
int cuEventRecordWithFlags(void *e, void *s, unsigned) { return cuEventRecord(e, s); }
int cuEventSynchronize(void *e) { ENTER; wait_for(events[(u64)e]); return 0; }
int cuEventQuery(void *e) { ENTER; join(host, events[(u64)e]); return 0; }
int cuEventElapsedTime_v2(float *ms, void *, void *) { return *ms = 0, 0; }
int cuEventElapsedTime(float *ms, void *, void *) { return *ms = 0, 0; }

int cuDeviceGetDefaultMemPool(void **p, int) { return *p = (void *)0x30, 0; }
int cuDeviceGetMemPool(void **p, int) { return *p = (void *)0x30, 0; }
int cuDeviceSetMemPool(int, void *) { return 0; }
int cuMemPoolCreate(void **p, const void *) { return *p = (void *)0x38, 0; }
int cuMemPoolDestroy(void *) { return 0; }
int cuMemPoolSetAttribute(void *, int, void *) { ENTER; return 0; }
int cuMemPoolGetAttribute(void *, int attribute, void *v) {
  ENTER;
  if (attribute <= 3) *(int *)v = 0;                                // reuse policies
  else *(u64 *)v = attribute == 4 ? 0 : attribute == 7 || attribute == 5 ? live : peak;
  return 0;
}
int cuMemPoolTrimTo(void *, size_t) { ENTER; return 0; }
int cuMemAllocAsync(u64 *p, size_t n, void *s) { ENTER; return allocate(p, n, queue_of(s)); }
int cuMemAllocFromPoolAsync(u64 *p, size_t n, void *, void *s) { ENTER; return allocate(p, n, queue_of(s)); }
int cuMemAlloc_v2(u64 *p, size_t n) { ENTER; return allocate(p, n, -1); }
int cuMemFreeAsync(u64 p, void *s) { ENTER; return release(p, queue_of(s)); }
int cuMemFree_v2(u64 p) { cuCtxSynchronize(); ENTER; return release(p, -1); }
int cuMemHostAlloc(void **p, size_t n, unsigned) { ENTER; *p = malloc(n); pinned[(u64)*p] = n; return 0; }
int cuMemAllocHost_v2(void **p, size_t n) { return cuMemHostAlloc(p, n, 0); }
int cuMemFreeHost(void *p) { ENTER; pinned.erase((u64)p); free(p); return 0; }
int cuMemHostRegister_v2(void *p, size_t n, unsigned) { ENTER; pinned[(u64)p] = n; return 0; }
int cuMemHostUnregister(void *p) { ENTER; pinned.erase((u64)p); return 0; }
int cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t n, void *s) { ENTER; return upload(to, from, n, queue_of(s)); }
int cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t n, void *s) { ENTER; return download(to, from, n, queue_of(s)); }
int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t n, void *s) { ENTER; return copy(to, from, n, queue_of(s)); }
int cuMemcpyPeerAsync(u64 to, void *, u64 from, void *, size_t n, void *s) { ENTER; return copy(to, from, n, queue_of(s)); }
int cuMemcpyHtoD_v2(u64 to, const void *from, size_t n) { ENTER; upload(to, from, n, queue_of(nullptr)); return cuStreamSynchronize(nullptr); }
int cuMemcpyDtoH_v2(void *to, u64 from, size_t n) { ENTER; download(to, from, n, queue_of(nullptr)); return cuStreamSynchronize(nullptr); }
int cuMemcpyDtoD_v2(u64 to, u64 from, size_t n) { ENTER; return copy(to, from, n, queue_of(nullptr)); }
int cuMemsetD8Async(u64 to, unsigned char v, size_t n, void *s) { ENTER; return fill(to, v, 1, n, queue_of(s)); }
int cuMemsetD16Async(u64 to, unsigned short v, size_t n, void *s) { ENTER; return fill(to, v, 2, n, queue_of(s)); }
int cuMemsetD32Async(u64 to, unsigned v, size_t n, void *s) { ENTER; return fill(to, v, 4, n, queue_of(s)); }
int cuMemsetD8_v2(u64 to, unsigned char v, size_t n) { ENTER; return fill(to, v, 1, n, queue_of(nullptr)); }

int cuModuleLoad(Module **, const char *) { return 500; }
int cuModuleLoadData(Module **m, const void *image) { ENTER; return load(m, (const char *)image); }
int cuModuleLoadDataEx(Module **m, const void *image, unsigned, void *, void *) { ENTER; return load(m, (const char *)image); }
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(Kernel **f, Module *m, const char *name) {
  ENTER;
  auto it = m->kernels.find(name);
  if (it == m->kernels.end()) return fault(std::string("no kernel ") + name), 500;
  *f = it->second;
  return 0;
}
int cuFuncGetAttribute(int *v, int attribute, Kernel *k) {
  Lock lock(mutex);
  *v = attribute == 0 ? (int)k->most_threads : attribute == 1 ? (int)k->fixed_shared : attribute == 8 ? (int)k->shared_limit : 32;
  return 0;
}
int cuFuncSetAttribute(Kernel *k, int attribute, int v) {
  ENTER;
  if (attribute == 8) {
    if (v + (long)k->fixed_shared > 232448) return fault("more shared memory than a card has: kernel " + k->name), 1;
    k->shared_limit = v;
  }
  return 0;
}
int cuFuncSetCacheConfig(void *, int) { return 0; }
int cuFuncLoad(void *) { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *, int, size_t) { return *n = 2, 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, void *, int, size_t, unsigned) { return *n = 2, 0; }
int cuOccupancyMaxPotentialBlockSize(int *grid, int *block, void *, void *, size_t, int) { return *grid = 264, *block = 256, 0; }
int cuLaunchKernel(Kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *s, void **params,
                   void **) {
  ENTER;
  unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return launch(k, grid, block, shared, s, params);
}
int cuLaunchCooperativeKernel(Kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *s,
                              void **params) {
  return cuLaunchKernel(k, gx, gy, gz, bx, by, bz, shared, s, params, nullptr);
}
int cuGetErrorName(int e, const char **s) {
  *s = e == 1 ? "CUDA_ERROR_INVALID_VALUE" : e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : e == 101 ? "CUDA_ERROR_INVALID_DEVICE" : e == 200 ? "CUDA_ERROR_INVALID_IMAGE" : e == 500 ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
int cuGetErrorString(int, const char **s) { return *s = "an error of the fake GPU", 0; }
int cuProfilerStart() { return 0; }
int cuProfilerStop() { return 0; }

// ---- cuBLAS ---------------------------------------------------------------------------------------------------------------------
int cublasCreate_v2(Blas **h) { ENTER; *h = new Blas; return 0; }
int cublasDestroy_v2(Blas *h) { delete h; return 0; }
int cublasGetVersion_v2(void *, int *v) { return *v = 130100, 0; }
int cublasSetStream_v2(Blas *h, void *s) { h->stream = s; return 0; }
int cublasSetWorkspace_v2(void *, void *, size_t) { ENTER; return 0; }
int cublasSetMathMode(Blas *h, int m) { ENTER; h->math = m & 15; return 0; }
int cublasGetMathMode(Blas *h, int *m) { return *m = h->math, 0; }
int cublasSetPointerMode_v2(void *, int) { return 0; }
int cublasGetPointerMode_v2(void *, int *m) { return *m = 0, 0; }
int cublasGemmStridedBatchedEx(Blas *h, int ta, int tb, int m, int n, int k, const void *, u64 a, int at, int lda, long long sa, u64 b, int bt, int ldb,
                               long long sb, const void *, u64 c, int ct, int ldc, long long sc, int batch, int compute, int) {
  ENTER;
  const char *type = compute_type(compute);
  return product(h->stream, ta, tb, m, n, k, a, at, lda, sa, b, bt, ldb, sb, c, ct, ldc, sc, batch, type, math_note(h, type));
}
int cublasGemmEx(Blas *h, int ta, int tb, int m, int n, int k, const void *, u64 a, int at, int lda, u64 b, int bt, int ldb, const void *, u64 c, int ct,
                 int ldc, int compute, int) {
  ENTER;
  const char *type = compute_type(compute);
  return product(h->stream, ta, tb, m, n, k, a, at, lda, 0, b, bt, ldb, 0, c, ct, ldc, 0, 1, type, math_note(h, type));
}
#define GEMM(name, type, compute)                                                                                                                        \
  int cublas##name##_v2(Blas *h, int ta, int tb, int m, int n, int k, const void *, u64 a, int lda, u64 b, int ldb, const void *, u64 c, int ldc) {      \
    ENTER;                                                                                                                                              \
    return product(h->stream, ta, tb, m, n, k, a, type, lda, 0, b, type, ldb, 0, c, type, ldc, 0, 1, compute, math_note(h, compute));                    \
  }                                                                                                                                                     \
  int cublas##name##StridedBatched(Blas *h, int ta, int tb, int m, int n, int k, const void *, u64 a, int lda, long long sa, u64 b, int ldb,            \
                                   long long sb, const void *, u64 c, int ldc, long long sc, int batch) {                                                \
    ENTER;                                                                                                                                              \
    return product(h->stream, ta, tb, m, n, k, a, type, lda, sa, b, type, ldb, sb, c, type, ldc, sc, batch, compute, math_note(h, compute));             \
  }
GEMM(Sgemm, 0, "f32")
GEMM(Dgemm, 1, "f64")
GEMM(Hgemm, 2, "f16")
int cublasHgemm(Blas *h, int ta, int tb, int m, int n, int k, const void *al, u64 a, int lda, u64 b, int ldb, const void *be, u64 c, int ldc) {
  return cublasHgemm_v2(h, ta, tb, m, n, k, al, a, lda, b, ldb, be, c, ldc);
}

// ---- cuBLASLt -------------------------------------------------------------------------------------------------------------------
struct LtMatrix {
  int type;
  u64 rows, columns;
  long long ld, stride = 0;
  int batch = 1;
};
struct LtProduct {
  int compute, ta = 0, tb = 0, epilogue = 1;
};
int cublasLtCreate(void **h) { ENTER; *h = calloc(1, 8); return 0; }
int cublasLtDestroy(void *h) { free(h); return 0; }
size_t cublasLtGetVersion() { return 130100; }
int cublasLtMatrixLayoutCreate(LtMatrix **l, int type, u64 rows, u64 columns, long long ld) { *l = new LtMatrix{type, rows, columns, ld}; return 0; }
int cublasLtMatrixLayoutDestroy(LtMatrix *l) { delete l; return 0; }
int cublasLtMatrixLayoutSetAttribute(LtMatrix *l, int attribute, const void *v, size_t) {
  if (attribute == 5) l->batch = *(int *)v;
  if (attribute == 6) l->stride = *(long long *)v;
  return 0;
}
int cublasLtMatmulDescCreate(LtProduct **d, int compute, int) { *d = new LtProduct{compute}; return 0; }
int cublasLtMatmulDescDestroy(LtProduct *d) { delete d; return 0; }
int cublasLtMatmulDescSetAttribute(LtProduct *d, int attribute, const void *v, size_t) {
  if (attribute == 3) d->ta = *(int *)v;
  if (attribute == 4) d->tb = *(int *)v;
  if (attribute == 7) d->epilogue = *(int *)v;
  return 0;
}
int cublasLtMatmulPreferenceCreate(void **p) { *p = calloc(1, 8); return 0; }
int cublasLtMatmulPreferenceDestroy(void *p) { free(p); return 0; }
int cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t) { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *result, int *found) {
  ENTER;
  memset(result, 0, 96); // cublasLtMatmulHeuristicResult_t: algorithm, workspace 0, state 0
  *found = 1;
  return 0;
}
int cublasLtMatmul(void *, LtProduct *d, const void *, u64 a, LtMatrix *al, u64 b, LtMatrix *bl, const void *, u64, void *, u64 out, LtMatrix *ol, const void *,
                   void *, size_t, void *s) {
  ENTER;
  return product(s, d->ta, d->tb, ol->rows, ol->columns, d->ta ? al->rows : al->columns, a, al->type, al->ld, al->stride, b, bl->type, bl->ld, bl->stride, out,
                 ol->type, ol->ld, ol->stride, ol->batch, compute_type(d->compute), d->epilogue == 1 ? " lt" : " lt-epilogue");
}

// ---- cuRAND ---------------------------------------------------------------------------------------------------------------------
int curandCreateGenerator(void **g, int) { *g = calloc(1, 8); return 0; }
int curandDestroyGenerator(void *g) { free(g); return 0; }
int curandSetStream(void **g, void *s) { *g = s; return 0; }
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }
int curandSetGeneratorOffset(void *, unsigned long long) { return 0; }
static int draw(void **g, u64 to, size_t n, u64 width) {
  launches++;
  int q = queue_of(*g);
  use(to, n * width, q, submit(q), true, "curand");
  return 0;
}
int curandGenerateUniform(void **g, u64 to, size_t n) { ENTER; return draw(g, to, n, 4); }
int curandGenerateUniformDouble(void **g, u64 to, size_t n) { ENTER; return draw(g, to, n, 8); }
int curandGenerateNormal(void **g, u64 to, size_t n, float, float) { ENTER; return draw(g, to, n, 4); }
int curandGenerateNormalDouble(void **g, u64 to, size_t n, double, double) { ENTER; return draw(g, to, n, 8); }

// ---- cuDNN ----------------------------------------------------------------------------------------------------------------------
int cudnnCreate(Dnn **h) { ENTER; *h = new Dnn; return 0; }
int cudnnDestroy(Dnn *h) { delete h; return 0; }
int cudnnSetStream(Dnn *h, void *s) { h->stream = s; return 0; }
int cudnnGetStream(Dnn *h, void **s) { return *s = h->stream, 0; }
size_t cudnnGetVersion() { return 91900; }
size_t cudnnGetCudartVersion() { return 13000; }
const char *cudnnGetErrorString(int) { return "an error of the fake cuDNN"; }
void cudnnGetLastErrorString(char *text, size_t n) { if (n) *text = 0; }
#define DESCRIPTOR(name)                                                                                                                                 \
  int cudnnCreate##name##Descriptor(Descriptor **d) { ENTER; *d = new Descriptor; return 0; }                                                           \
  int cudnnDestroy##name##Descriptor(Descriptor *d) { delete d; return 0; }
DESCRIPTOR(Convolution)
DESCRIPTOR(Tensor)
DESCRIPTOR(Filter)
DESCRIPTOR(Activation)
static int set(Descriptor *d, int type, bool channels_last, std::initializer_list<long> dims) {
  d->type = type;
  d->channels_last = channels_last;
  d->rank = 0;
  for (long n : dims) d->d[d->rank++] = n;
  return 0;
}
int cudnnSetTensor4dDescriptor(Descriptor *d, int layout, int type, int n, int c, int h, int w) { return set(d, type, layout == 1, {n, c, h, w}); }
int cudnnSetTensor4dDescriptorEx(Descriptor *d, int type, int n, int c, int h, int w, int, int sc, int, int) { return set(d, type, sc == 1 && c > 1, {n, c, h, w}); }
int cudnnSetTensorNdDescriptor(Descriptor *d, int type, int rank, const int *dims, const int *strides) {
  set(d, type, rank > 1 && strides[1] == 1 && dims[1] > 1, {});
  for (d->rank = 0; d->rank < std::min(rank, 8); d->rank++) d->d[d->rank] = dims[d->rank];
  return 0;
}
int cudnnSetFilter4dDescriptor(Descriptor *d, int type, int layout, int k, int c, int h, int w) { return set(d, type, layout == 1, {k, c, h, w}); }
int cudnnSetFilterNdDescriptor(Descriptor *d, int type, int layout, int rank, const int *dims) {
  set(d, type, layout == 1, {});
  for (d->rank = 0; d->rank < std::min(rank, 8); d->rank++) d->d[d->rank] = dims[d->rank];
  return 0;
}
int cudnnSetConvolution2dDescriptor(Descriptor *d, int ph, int pw, int sh, int sw, int dh, int dw, int, int type) { return set(d, type, false, {ph, pw, sh, sw, dh, dw}); }
int cudnnSetConvolutionNdDescriptor(Descriptor *d, int rank, const int *pad, const int *stride, const int *dilation, int, int type) {
  if (rank != 2) return 9; // not supported
  return set(d, type, false, {pad[0], pad[1], stride[0], stride[1], dilation[0], dilation[1]});
}
int cudnnSetConvolutionMathType(Descriptor *d, int m) { return d->math = m, 0; }
int cudnnSetConvolutionGroupCount(Descriptor *d, int n) { return d->groups = n, 0; }
int cudnnSetActivationDescriptor(void *, int, int, double) { return 0; }
int cudnnGetConvolution2dForwardOutputDim(Descriptor *c, Descriptor *x, Descriptor *w, int *n, int *k, int *h, int *v) {
  auto out = [&](int i) { return (int)((x->d[2 + i] + 2 * c->d[i] - c->d[4 + i] * (w->d[2 + i] - 1) - 1) / c->d[2 + i] + 1); };
  return *n = x->d[0], *k = w->d[0], *h = out(0), *v = out(1), 0;
}
int cudnnGetConvolutionForwardAlgorithmMaxCount(void *, int *n) { return *n = 8, 0; }
int cudnnGetConvolutionBackwardDataAlgorithmMaxCount(void *, int *n) { return *n = 6, 0; }
int cudnnGetConvolutionBackwardFilterAlgorithmMaxCount(void *, int *n) { return *n = 7, 0; }
int cudnnGetConvolutionForwardAlgorithm_v7(void *, void *, void *, Descriptor *c, void *, int most, int *n, Algorithm *a) { ENTER; return algorithms(c, 0, most, n, a); }
int cudnnGetConvolutionBackwardDataAlgorithm_v7(void *, void *, void *, Descriptor *c, void *, int most, int *n, Algorithm *a) { ENTER; return algorithms(c, 1, most, n, a); }
int cudnnGetConvolutionBackwardFilterAlgorithm_v7(void *, void *, void *, Descriptor *c, void *, int most, int *n, Algorithm *a) { ENTER; return algorithms(c, 2, most, n, a); }
int cudnnFindConvolutionForwardAlgorithm(void *, void *, void *, Descriptor *c, void *, int most, int *n, Algorithm *a) { ENTER; return algorithms(c, 0, most, n, a); }
int cudnnFindConvolutionBackwardDataAlgorithm(void *, void *, void *, Descriptor *c, void *, int most, int *n, Algorithm *a) { ENTER; return algorithms(c, 1, most, n, a); }
int cudnnFindConvolutionBackwardFilterAlgorithm(void *, void *, void *, Descriptor *c, void *, int most, int *n, Algorithm *a) { ENTER; return algorithms(c, 2, most, n, a); }
int cudnnFindConvolutionForwardAlgorithmEx(void *, void *, const void *, void *, const void *, Descriptor *c, void *, void *, int most, int *n, Algorithm *a, void *, size_t) { ENTER; return algorithms(c, 0, most, n, a); }
int cudnnFindConvolutionBackwardDataAlgorithmEx(void *, void *, const void *, void *, const void *, Descriptor *c, void *, void *, int most, int *n, Algorithm *a, void *, size_t) { ENTER; return algorithms(c, 1, most, n, a); }
int cudnnFindConvolutionBackwardFilterAlgorithmEx(void *, void *, const void *, void *, const void *, Descriptor *c, void *, void *, int most, int *n, Algorithm *a, void *, size_t) { ENTER; return algorithms(c, 2, most, n, a); }
int cudnnGetConvolutionForwardWorkspaceSize(void *, void *, void *, void *, void *, int a, size_t *n) { ENTER; return workspace(0, a, n); }
int cudnnGetConvolutionBackwardDataWorkspaceSize(void *, void *, void *, void *, void *, int a, size_t *n) { ENTER; return workspace(1, a, n); }
int cudnnGetConvolutionBackwardFilterWorkspaceSize(void *, void *, void *, void *, void *, int a, size_t *n) { ENTER; return workspace(2, a, n); }
int cudnnConvolutionForward(void *h, const void *, Descriptor *x, u64 xp, Descriptor *w, u64 wp, Descriptor *c, int, u64 ws, size_t wn, const void *, Descriptor *y, u64 yp) {
  ENTER;
  return convolution("forward", h, x, xp, w, wp, c, ws, wn, y, yp);
}
int cudnnConvolutionBackwardData(void *h, const void *, Descriptor *w, u64 wp, Descriptor *y, u64 yp, Descriptor *c, int, u64 ws, size_t wn, const void *, Descriptor *x, u64 xp) {
  ENTER;
  return convolution("data", h, x, xp, w, wp, c, ws, wn, y, yp);
}
int cudnnConvolutionBackwardFilter(void *h, const void *, Descriptor *x, u64 xp, Descriptor *y, u64 yp, Descriptor *c, int, u64 ws, size_t wn, const void *, Descriptor *w, u64 wp) {
  ENTER;
  return convolution("filter", h, x, xp, w, wp, c, ws, wn, y, yp);
}
int cudnnConvolutionBackwardBias(Dnn *h, const void *, Descriptor *y, u64 yp, const void *, Descriptor *b, u64 bp) {
  ENTER;
  launches++;
  int q = queue_of(h->stream);
  u64 time = submit(q), bytes = y->elements() * dnn_size(y->type);
  use(yp, bytes, q, time, false, "convolution bias");
  use(bp, b->elements() * dnn_size(b->type), q, time, true, "convolution bias");
  add(kernels, "cudnnConvolutionBackwardBias 1,1,1 1,1,1 0", bytes);
  return 0;
}
int cudnnConvolutionBiasActivationForward(void *h, const void *, Descriptor *x, u64 xp, Descriptor *w, u64 wp, Descriptor *c, int, u64 ws, size_t wn, const void *, Descriptor *,
                                          u64, Descriptor *, u64, void *, Descriptor *y, u64 yp) {
  ENTER;
  return convolution("forward", h, x, xp, w, wp, c, ws, wn, y, yp);
}
int cudnnAddTensor(Dnn *h, const void *, Descriptor *a, u64 ap, const void *, Descriptor *c, u64 cp) {
  ENTER;
  launches++;
  int q = queue_of(h->stream);
  u64 time = submit(q), bytes = c->elements() * dnn_size(c->type);
  use(ap, a->elements() * dnn_size(a->type), q, time, false, "add tensor");
  use(cp, bytes, q, time, true, "add tensor");
  add(kernels, "cudnnAddTensor 1,1,1 1,1,1 0", 2.0 * bytes);
  return 0;
}
#define VERSION_CHECK(name) int cudnn##name##VersionCheck() { return 0; }
VERSION_CHECK(Ops) VERSION_CHECK(OpsInfer) VERSION_CHECK(OpsTrain) VERSION_CHECK(Cnn) VERSION_CHECK(CnnInfer) VERSION_CHECK(CnnTrain)
VERSION_CHECK(Adv) VERSION_CHECK(AdvInfer) VERSION_CHECK(AdvTrain)

} // extern "C"

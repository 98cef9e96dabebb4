// Memory that counting_driver.c or the real driver behind it has given out; part of that file,
// whose lock guards it.
#ifndef COUNTING_MEMORY_H
#define COUNTING_MEMORY_H

enum { kMaxBlocks = 4096 };

struct Block {
  char* start;  // NULL: free place
  size_t bytes;
  int memory_type;  // 1 host, 2 device
};

static struct Block blocks[kMaxBlocks];

// Allocations that nobody has freed, of the GPU's memory and of pinned host memory; in mode
// "forward" too.
size_t fake_blocks(void) {
  size_t live = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < kMaxBlocks; ++i) live += blocks[i].start != NULL;
  pthread_mutex_unlock(&lock);
  return live;
}

// Bytes of them.
size_t fake_bytes(void) {
  size_t live = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < kMaxBlocks; ++i) live += blocks[i].start ? blocks[i].bytes : 0;
  pthread_mutex_unlock(&lock);
  return live;
}

// Under the lock.
static struct Block* find(Address address) {
  for (int i = 0; i < kMaxBlocks; ++i) {
    Address start = (Address)(uintptr_t)blocks[i].start;
    if (start && address >= start && address < start + blocks[i].bytes) return &blocks[i];
  }
  return NULL;
}

// The block of that address, as it is now; start NULL where there is none.
static struct Block block_of(Address address) {
  pthread_mutex_lock(&lock);
  struct Block* found = find(address);
  struct Block block = found ? *found : (struct Block){NULL, 0, 0};
  pthread_mutex_unlock(&lock);
  return block;
}

static int place_of(const void* start) {
  int i = 0;
  while (i < kMaxBlocks && blocks[i].start != start) ++i;
  return i;
}

// Poisoned, so that nobody relies on zeros. Starts lie 256 bytes apart, as the driver's do.
static Code allocate(void** out, size_t bytes, int memory_type) {
  if (!has_context()) return kInvalidContext;
  if (is("capture")) return kCapture;
  if (!bytes) return kInvalidValue;
  if (is("oom_on_alloc")) return kOutOfMemory;
  pthread_mutex_lock(&lock);
  int i = place_of(NULL);
  char* start = i < kMaxBlocks ? aligned_alloc(256, (bytes + 255) / 256 * 256) : NULL;
  if (start) {
    memset(start, 0xFF, bytes);
    blocks[i] = (struct Block){start, bytes, memory_type};
    *out = start;
  }
  pthread_mutex_unlock(&lock);
  return start ? kOk : kOutOfMemory;
}

static Code release(Address address, int memory_type) {
  if (!has_context()) return kInvalidContext;
  pthread_mutex_lock(&lock);
  struct Block* block = find(address);
  int found =
      block && (Address)(uintptr_t)block->start == address && block->memory_type == memory_type;
  if (found) {
    free(block->start);
    block->start = NULL;
  }
  pthread_mutex_unlock(&lock);
  return found ? kOk : kInvalidValue;
}

// The real driver has given memory out.
static void note(void* start, size_t bytes, int memory_type) {
  pthread_mutex_lock(&lock);
  int i = place_of(NULL);
  if (i == kMaxBlocks) {
    fprintf(stderr, "counting driver: more than %d allocations\n", kMaxBlocks);
    abort();
  }
  blocks[i] = (struct Block){start, bytes, memory_type};
  pthread_mutex_unlock(&lock);
}

// The real driver is about to take memory back, perhaps some that was never noted: before it does,
// for afterwards another thread may have been given the same. What was noted.
static struct Block forget(const void* start) {
  struct Block was = {NULL, 0, 0};
  pthread_mutex_lock(&lock);
  int i = place_of(start);
  if (start && i < kMaxBlocks) {
    was = blocks[i];
    blocks[i].start = NULL;
  }
  pthread_mutex_unlock(&lock);
  return was;
}

static Code copy(void* to, const void* from, size_t bytes, Address device) {
  if (!has_context()) return kInvalidContext;
  if (is("capture")) return kCapture;
  struct Block block = block_of(device);
  size_t offset = device - (Address)(uintptr_t)block.start;
  if (!block.start || offset + bytes > block.bytes) return kInvalidValue;
  memcpy(to, from, bytes);
  return kOk;
}

#endif

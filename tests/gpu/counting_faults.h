// Failures that counting_driver.c is told to make; part of that file, whose lock guards them.
#ifndef COUNTING_FAULTS_H
#define COUNTING_FAULTS_H

static char failing[96];
static long until_failure, failure;
static int lost_by;
static int is_armed = 1;

// As FAKE_FAIL says; counted from here on.
void fake_fail(const char* what) {
  char name[96] = "";
  long nth = 0, code = 0;
  if (sscanf(what, "%95[^:]:%ld:%ld", name, &nth, &code) != 3) nth = 0;
  pthread_mutex_lock(&lock);
  snprintf(failing, sizeof failing, "%s", name);
  until_failure = nth;
  failure = code;
  lost_by = 0;
  pthread_mutex_unlock(&lock);
}

// A test's own calls do not count and do not fail while it is disarmed.
void fake_arm(int on) { is_armed = on; }

static int needs_context(const char* name) {
  static const char* const free_of_it[] = {"cuInit",      "cuDriverGetVersion", "cuGetErrorName",
                                           "cuDeviceGet", "cuCtxPushCurrent",   "cuCtxPopCurrent"};
  for (size_t i = 0; i < sizeof free_of_it / sizeof *free_of_it; ++i) {
    if (!strncmp(name, free_of_it[i], strlen(free_of_it[i]))) return 0;
  }
  return 1;
}

// The code that this call is made to end in; 0 for none. Under the lock.
static int injected(const char* name) {
  if (!is_armed) return 0;
  if (lost_by && needs_context(name)) return lost_by;
  if (until_failure <= 0 || (strcmp(failing, "*") && strcmp(failing, name))) return 0;
  if (!strcmp(name, "cuGetErrorName") || --until_failure > 0) return 0;
  if (failure == 700 || failure == 702 || (failure >= 709 && failure <= 719))
    lost_by = (int)failure;
  return (int)failure;
}

// Counts a call; the code it must end in instead of doing anything, or 0.
static int count(const char* name) {
  static int is_read;
  if (!is_read && getenv("FAKE_FAIL")) fake_fail(getenv("FAKE_FAIL"));
  is_read = 1;
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < kMaxNames - 1 && counts[i].name && strcmp(counts[i].name, name)) ++i;
  counts[i].name = name;
  counts[i].calls += is_armed;
  int code = injected(name);
  pthread_mutex_unlock(&lock);
  return code;
}

#endif

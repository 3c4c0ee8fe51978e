/* A clock that can be set for one run alone: preloaded, it adds the seconds in the file JUMPING_CLOCK to the clock of
   the day, and leaves the one that only goes forward. libfaketime does this too, but breaks Python's sleep and makes
   condition variables spin. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *jump;
static int (*clock_of_the_system)(clockid_t, struct timespec *);

__attribute__((constructor)) static void start(void) {
  int file = open(getenv("JUMPING_CLOCK"), O_RDONLY);
  void *seen = mmap(NULL, sizeof *jump, PROT_READ, MAP_SHARED, file, 0);
  if (seen == MAP_FAILED) abort();
  jump = seen;
  close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  if (!clock_of_the_system) clock_of_the_system = dlsym(RTLD_NEXT, "clock_gettime");
  int result = clock_of_the_system(clock, now);
  if (result == 0 && clock == CLOCK_REALTIME && jump) now->tv_sec += *jump;
  return result;
}

int gettimeofday(struct timeval *now, void *zone) {
  (void)zone;
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *now) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  if (now) *now = precise.tv_sec;
  return precise.tv_sec;
}

/* Who waits until a moment of the clock of the day has read it here. The kernel knows nothing of the jump, and would
   wake at once, or an hour late, where a real jump would not. Of a clock that only goes forward moments are small. */
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
  struct timespec moment = *until;
  if (moment.tv_sec < 1000000000) return pthread_cond_clockwait(condition, mutex, CLOCK_MONOTONIC, &moment);
  moment.tv_sec -= *jump;
  return pthread_cond_clockwait(condition, mutex, CLOCK_REALTIME, &moment);
}

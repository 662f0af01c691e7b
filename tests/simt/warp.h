// Operations that the threads of a warp or warpgroup execute as one.
#pragma once
#include "simt/core.h"

namespace simt {

// The operands of a group: a pointer to that of thread i, null where the mask leaves it out.
template <class Operand>
struct Operands {
  void* const* all;
  Operand* operator[](unsigned i) const { return static_cast<Operand*>(all[i]); }
};

// The open meeting that this thread is meant to join; null if it opens one. Faults where the group
// disagrees about what it does.
inline Meeting* open_meeting(unsigned first, unsigned size, uint32_t mask, const char* what,
                             Where where) {
  Thread& me = self();
  for (Meeting* m : me.block->meetings) {
    if (m->first >= first + size || first >= m->first + m->size) continue;
    const bool disjoint = m->size == kWarp && size == kWarp && (m->mask & mask) == 0;
    if (disjoint) continue;
    if (m->first == first && m->size == size && m->mask == mask && m->where == where &&
        same_text(m->what, what))
      return m;
    fault(where,
          "divergent: %s with mask %08x, while others of the group are at %s with mask %08x, %s",
          what, mask, m->what, m->mask, name(m->where).c_str());
  }
  return nullptr;
}

// Faults unless all threads that the operation needs exist and run.
inline void check_members(unsigned first, unsigned size, uint32_t mask, const char* what,
                          Where where) {
  const Block& b = *self().block;
  for (unsigned i = 0; i < size; ++i) {
    if (size == kWarp && !(mask >> i & 1)) continue;
    if (first + i >= b.threads.size())
      fault(where, "%s needs thread %u of a block of %zu", what, first + i, b.threads.size());
    if (b.threads[first + i]->exited)
      fault(where, "%s needs thread %u, which has exited", what, first + i);
  }
}

inline Meeting* new_meeting(unsigned first, unsigned size, uint32_t mask, const char* what,
                            Where where) {
  std::vector<Meeting*>& spare = machine.spare_meetings;
  if (spare.empty()) {
    machine.meetings.push_back(std::make_unique<Meeting>());
    spare.push_back(machine.meetings.back().get());
  }
  Meeting* m = spare.back();
  spare.pop_back();
  m->first = first, m->size = size, m->mask = mask, m->what = what, m->where = where;
  m->expected = size == kWarp ? unsigned(__builtin_popcount(mask)) : size;
  m->arrived = 0;
  for (unsigned i = 0; i < size; ++i) m->operands[i] = nullptr, m->members[i] = nullptr;
  self().block->meetings.push_back(m);
  return m;
}

inline void end_meeting(Meeting* m) {
  std::vector<Meeting*>& open = self().block->meetings;
  *std::find(open.begin(), open.end(), m) = open.back();
  open.pop_back();
  machine.spare_meetings.push_back(m);
}

// All threads of the group come here, each with its operand. The last one runs execute(Operands); then
// all go on.
template <class Operand, class Execute>
void meet(unsigned first, unsigned size, uint32_t mask, Operand& mine, const Execute& execute,
          const char* what, Where where) {
  Thread& me = self();
  Meeting* m = open_meeting(first, size, mask, what, where);
  if (m == nullptr) {
    check_members(first, size, mask, what, where);
    m = new_meeting(first, size, mask, what, where);
  }
  m->operands[me.rank - first] = &mine;
  m->members[me.rank - first] = &me;
  if (++m->arrived < m->expected) return wait(what, where);
  execute(Operands<Operand>{m->operands});
  for (unsigned i = 0; i < size; ++i)
    if (m->members[i] != nullptr && m->members[i] != &me) wake(m->members[i]);
  end_meeting(m);
}

// The lanes of `mask` of the thread's warp; it must be one of them.
template <class Operand, class Execute>
void meet_warp(uint32_t mask, Operand& mine, const Execute& execute, const char* what,
               Where where) {
  const Thread& me = self();
  if (!(mask >> me.lane & 1)) fault(where, "%s with mask %08x by lane %u", what, mask, me.lane);
  meet(me.rank - me.lane, kWarp, mask, mine, execute, what, where);
}

// All 128 threads of the thread's warpgroup: four warps, the first one's number divisible by 4.
template <class Operand, class Execute>
void meet_warpgroup(Operand& mine, const Execute& execute, const char* what, Where where) {
  meet(self().rank / kWarpgroup * kWarpgroup, kWarpgroup, ~0u, mine, execute, what, where);
}

// A thread that exits while others of its group wait for it.
inline void check_meetings_at_exit() {
  const Thread& me = self();
  for (const Meeting* m : me.block->meetings)
    if (m->holds(me.rank))
      fault(m->where, "%s waits for a thread that exits: thread %u", m->what, me.rank);
}

// What lane `from(lane)` holds. from must name a lane of the mask.
template <class T, class From>
T shuffle(uint32_t mask, T value, const From& from, const char* what, Where where) {
  struct Operand {
    T in, out;
  } mine = {value, value};
  meet_warp(
      mask, mine,
      [&](Operands<Operand> all) {
        for (unsigned i = 0; i < kWarp; ++i) {
          if (all[i] == nullptr) continue;
          const unsigned source = from(i);
          if (source >= kWarp || all[source] == nullptr)
            fault(where, "%s: lane %u reads lane %u, not in mask %08x", what, i, source, mask);
          all[i]->out = all[source]->in;
        }
      },
      what, where);
  return mine.out;
}

// The lanes whose predicate holds.
inline uint32_t ballot(uint32_t mask, bool predicate, const char* what, Where where) {
  struct Operand {
    bool in;
    uint32_t out;
  } mine = {predicate, 0};
  meet_warp(
      mask, mine,
      [&](Operands<Operand> all) {
        uint32_t votes = 0;
        for (unsigned i = 0; i < kWarp; ++i)
          if (all[i] != nullptr && all[i]->in) votes |= 1u << i;
        for (unsigned i = 0; i < kWarp; ++i)
          if (all[i] != nullptr) all[i]->out = votes;
      },
      what, where);
  return mine.out;
}

}  // namespace simt

/**
 * What survives a reload of the page in this tab: which session it was, its prompts, and the
 * branches of its video.
 */

const KEY = "longlive.session";

/** @param {object} state */
export function remember(state) {
  if (!state.session) return;
  const {id, seed} = state.session;
  const {shots, first, branches} = state;
  write({id, seed, shots, first, branches});
}

function write(record) {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(record));
  } catch {
    sessionStorage.setItem(KEY, JSON.stringify({...record, first: null})); // the picture is large
  }
}

/** Forgets a session that has ended; a reload goes on with another branch, if there is one. */
export function forget(id) {
  const record = recall();
  const branches = record?.branches?.filter((other) => other !== id) ?? [];
  if (!branches.length) return forgetAll();
  const known = branches.includes(record.id);
  return write({...record, branches, ...(known ? {} : {id: branches.at(-1), shots: []})});
}

export function forgetAll() {
  sessionStorage.removeItem(KEY);
}

/**
 * @returns {{id: string, shots: object[], first: object | null, branches?: string[]} | null}
 *   `branches` are ids
 */
export function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY));
  } catch {
    return null;
  }
}

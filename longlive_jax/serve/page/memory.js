/** What survives a reload of the page in this tab: which session it was, and its prompts. */

const KEY = "longlive.session";

/** @param {object} state */
export function remember(state) {
  if (!state.session) return;
  const {id, seed} = state.session;
  const record = {id, seed, shots: state.shots, first: state.first};
  try {
    sessionStorage.setItem(KEY, JSON.stringify(record));
  } catch {
    sessionStorage.setItem(KEY, JSON.stringify({...record, first: null})); // the picture is large
  }
}

export function forget() {
  sessionStorage.removeItem(KEY);
}

/** @returns {{id: string, shots: object[], first: object | null} | null} */
export function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY));
  } catch {
    return null;
  }
}
